"""Each kind of change does to a weight what its definition says, whole, in parts and in other forms."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from deltas_cases import CASES, Case, lokr, lora, numbers
from torch import Tensor

from adapterkit.deltas import (
    Change,
    ExpertsLowRank,
    LowRank,
    Magnitude,
    Reshape,
    Scaling,
    TLora,
    Tokens,
    Whole,
    add,
    build,
    cosine,
    fold,
    identical,
    norm,
    relative_error,
    stack,
    transpose,
)
from adapterkit.errors import AdapterkitError, Mismatch, Unrepresentable, UsageError
from adapterkit.specs.kinds import KINDS

ROWS = 12


def every_case() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", CASES)


def check_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    size = float(expected.norm()) or 1.0
    assert float((actual - expected).norm()) <= tolerance * size


def check_delta(change: Change, case: Case, rows: slice = slice(None), tolerance: float = 1e-12) -> None:
    """The change makes these rows of the weight what the definition makes them."""
    base = case.base[rows]
    check_close(base + change.dense(base, torch.float64), case.expected[rows], tolerance)


def is_exact(change: Change) -> bool:
    """Whether every factor is float64, so that expanding it in float64 rounds nothing worth naming."""
    return all(t.dtype == torch.float64 for t in change.tensors().values() if t.is_floating_point())


@every_case()
def test_a_delta_is_what_the_definition_says(name: str) -> None:
    case = CASES[name]()
    check_delta(case.change, case)
    check_close(case.change.dense(case.base.float()).double(), case.expected - case.base, 1e-5)


@every_case()
def test_a_delta_needs_the_base_exactly_where_the_kind_says_so(name: str) -> None:
    change, base = CASES[name]().change, CASES[name]().base
    if change.needs_base:
        with pytest.raises(UsageError, match="depends on the weight"):
            change.dense()
    else:
        check_close(change.dense(dtype=torch.float64).reshape(base.shape), change.dense(base, torch.float64))


@every_case()
def test_a_delta_is_made_where_the_base_is(name: str) -> None:
    """On the device without memory, where an operand left behind would be an error."""
    if name in {"oft, constrained", "oft, loosely constrained", "oft_input, scaled"}:
        pytest.skip("the numbers decide how it is computed")
    case = CASES[name]()
    delta = case.change.dense(case.base.to("meta"))
    assert delta.device.type == "meta" and delta.shape == case.base.shape


@every_case()
def test_tensors_are_the_stored_ones_by_their_roles(name: str) -> None:
    change = CASES[name]().change
    roles = set(change.tensors()) - {"magnitude"}
    kind = change.inner.kind if isinstance(change, Magnitude) else change.kind
    assert roles <= KINDS[kind].roles
    assert any(required <= roles for required in KINDS[kind].required)
    held = [getattr(change, field.name) for field in dataclasses.fields(change)]
    if not isinstance(change, Magnitude):
        assert all(any(tensor is one for one in held) for tensor in change.tensors().values())


@every_case()
def test_the_shape_is_that_of_the_weight_as_far_as_it_is_known(name: str) -> None:
    case = CASES[name]()
    assert case.change.shape in (tuple(case.base.shape), ())
    assert case.change.rows in (case.base.shape[0], None)


@every_case()
@pytest.mark.parametrize("start, stop", [(0, 12), (0, 4), (4, 8), (8, 12), (4, 12)])
def test_rows_taken_change_the_rows_they_were(name: str, start: int, stop: int) -> None:
    case = CASES[name]()
    try:
        part = case.change.take(start, stop)
    except Unrepresentable as refusal:
        assert refusal.details["start"] == start
        assert name in {
            "boft",
            "oft, constrained",
            "dora, columns",
            "dora, columns of a convolution",
            "dora over lokr",
        }
        return
    if name == "oft, constrained":
        assert (start, stop) == (0, 12)
    check_delta(part, case, slice(start, stop))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("lokr")])
def test_a_cut_through_a_kronecker_block_is_refused_with_the_option_that_helps(name: str) -> None:
    case = CASES[name]()
    with pytest.raises(Unrepresentable, match="blocks of 4 rows") as caught:
        case.change.take(2, 8)
    assert "--as lora" in caught.value.hint
    check_delta(case.change.low_rank().take(2, 8), case, slice(2, 8))


def test_a_cut_through_a_rotated_block_is_refused() -> None:
    with pytest.raises(Unrepresentable, match="blocks of 4 rows"):
        CASES["oft"]().change.take(2, 8)


@every_case()
def test_rows_that_are_not_there_cannot_be_taken(name: str) -> None:
    change = CASES[name]().change
    for start, stop in ((-1, 4), (4, 4), (8, 4)):
        with pytest.raises(UsageError):
            change.take(start, stop)
    if change.rows is not None:
        with pytest.raises(UsageError):
            change.take(0, change.rows + 1)


@every_case()
def test_the_low_rank_form_is_the_same_change(name: str) -> None:
    case = CASES[name]()
    if case.change.expanded_rank is None:
        assert case.change.needs_base or isinstance(case.change, Whole | ExpertsLowRank)
        with pytest.raises(Unrepresentable):
            case.change.low_rank()
        return
    form = case.change.low_rank()
    assert form.mid is None and form.up.shape[1] == form.rank == case.change.expanded_rank
    check_delta(form, case)


@pytest.mark.parametrize(
    "name, rank",
    [
        ("loha", 9),
        ("loha, core", 4),
        ("lokr", 6),
        ("lokr, second factored", 4),
        ("lokr, both factored", 2),
        ("lokr, core", 4),
        ("lora, mid", 3),
        ("adalora", 3),
    ],
)
def test_the_low_rank_form_has_no_more_ranks_than_the_factors_allow(name: str, rank: int) -> None:
    assert CASES[name]().change.low_rank().rank == rank


# Stacking


def parts_of(
    *ranks: int, scales: tuple[float, ...] = (), dtype: torch.dtype = torch.float32
) -> list[LowRank]:
    """LoRAs of 4, 5, 6 … rows and 7 columns."""
    return [
        LowRank(
            numbers(4 + place, rank, seed=10 + place, dtype=dtype),
            numbers(rank, 7, seed=20 + place, dtype=dtype),
            scales[place] if scales else 0.5,
        )
        for place, rank in enumerate(ranks)
    ]


def heights_of(parts: list[LowRank]) -> list[int]:
    return [part.shape[0] for part in parts]


def starts_of(heights: list[int]) -> list[int]:
    return [sum(heights[:place]) for place in range(len(heights))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("missing", [(), (0,), (1,), (2,), (0, 2)])
def test_a_stack_gives_back_its_parts_bit_for_bit(dtype: torch.dtype, missing: tuple[int, ...]) -> None:
    parts = parts_of(2, 3, 1, dtype=dtype)
    heights = heights_of(parts)
    given = [None if place in missing else part for place, part in enumerate(parts)]
    whole = stack(given, heights)
    assert isinstance(whole, LowRank)
    assert whole.rank == sum(part.rank for part in given if part is not None)
    for part, start, height in zip(given, starts_of(heights), heights, strict=True):
        taken = whole.take(start, start + height)
        if part is None:
            assert not taken.dense().any()
        else:
            assert identical(taken, part)


@pytest.mark.parametrize("scales", [(0.5, 0.5, 0.5), (0.5, 2.0, 0.5), (0.25, 0.5, 1.0)])
def test_powers_of_two_between_the_scales_stack_exactly(scales: tuple[float, ...]) -> None:
    parts = parts_of(2, 3, 4, scales=scales)
    dense = torch.cat([part.dense() for part in parts])
    assert torch.equal(stack(parts, heights_of(parts)).dense(), dense)


def test_unequal_scales_become_the_most_common_one_and_leave_its_parts_alone() -> None:
    parts = parts_of(2, 3, 4, scales=(0.3, 0.7, 0.7), dtype=torch.float16)
    heights = heights_of(parts)
    whole = stack(parts, heights)
    assert isinstance(whole, LowRank) and whole.scale == 0.7 and whole.up.dtype == torch.float16
    assert identical(whole.take(4, 9), parts[1]) and identical(whole.take(9, 15), parts[2])
    check_close(whole.take(0, 4).dense(), parts[0].dense(), 1e-3)


@pytest.mark.parametrize("value, scale", [(6e-8, 1 / 64), (6e4, 8.0)])
def test_a_factor_that_a_half_cannot_hold_is_kept_in_single_precision(value: float, scale: float) -> None:
    """The ratio of the scales would flush the small one to zero and make the large one infinite."""
    extreme = LowRank(
        torch.full((2, 1), value, dtype=torch.float16), torch.ones(1, 7, dtype=torch.float16), scale
    )
    ones = LowRank(torch.ones(2, 1, dtype=torch.float16), torch.ones(1, 7, dtype=torch.float16), 1.0)
    whole = stack([extreme, ones, ones], [2, 2, 2])
    assert torch.equal(whole.take(0, 2).dense(), extreme.dense())


def test_a_scale_of_zero_is_no_reference() -> None:
    dead, alive = parts_of(2, 3, scales=(0.0, 0.5))
    whole = stack([dead, alive], [4, 5])
    assert not whole.dense()[:4].any() and torch.equal(whole.dense()[4:], alive.dense())
    none = stack([dead, dataclasses.replace(alive, scale=0.0)], [4, 5])
    assert not none.dense().any()


def test_parts_that_share_down_keep_it_once() -> None:
    first = parts_of(3)[0]
    others = [dataclasses.replace(first, up=numbers(h, 3, seed=h, dtype=torch.float32)) for h in (5, 6)]
    whole = stack([first, None, *others], [4, 2, 5, 6])
    assert isinstance(whole, LowRank) and whole.rank == 3 and whole.down is first.down
    assert identical(whole.take(6, 11), others[0])
    mixed = stack([first, *parts_of(2), others[0]], [4, 4, 5])
    assert mixed.rank == 5
    assert identical(mixed.take(8, 13), others[0])


def test_cut_and_stacked_again_is_the_change_before() -> None:
    change = lora().change
    assert isinstance(change, LowRank)
    parts = [change.take(0, 5), change.take(5, 6), change.take(6, 12)]
    assert all(isinstance(part, LowRank) and part.down is change.down for part in parts)
    assert identical(stack(parts, [5, 1, 6]), change)


def test_an_untrained_part_keeps_its_down() -> None:
    trained, other = parts_of(2, 3)
    untrained = dataclasses.replace(other, up=torch.zeros_like(other.up))
    whole = stack([trained, untrained], [4, 5])
    assert identical(whole.take(0, 4), trained)
    rest = whole.take(4, 9)
    assert isinstance(rest, LowRank) and rest.rank == 5 and not rest.dense().any()
    nothing = untrained.take(1, 3)
    assert isinstance(nothing, LowRank) and nothing.down is untrained.down


def test_a_rank_that_is_zero_in_the_rows_taken_is_dropped() -> None:
    up = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    change = LowRank(up, numbers(3, 5, seed=1, dtype=torch.float32))
    part = change.take(0, 2)
    assert isinstance(part, LowRank)
    assert torch.equal(part.up, up[:2, [0, 2]]) and torch.equal(part.down, change.down[[0, 2]])


def test_dtypes_that_differ_are_promoted() -> None:
    half, brain = parts_of(2, dtype=torch.float16)[0], parts_of(2, dtype=torch.bfloat16)[0]
    whole = stack([half, brain], [4, 4])
    assert isinstance(whole, LowRank) and whole.up.dtype == torch.float32
    assert torch.equal(whole.dense(), torch.cat([half.dense(), brain.dense()]))
    eight = parts_of(2, dtype=torch.float8_e5m2)[0]
    assert torch.equal(stack([half, eight], [4, 4]).dense(), torch.cat([half.dense(), eight.dense()]))


def test_trailing_ones_of_a_convolution_are_added_where_they_lack() -> None:
    linear = LowRank(numbers(4, 2, seed=1), numbers(2, 5, seed=2))
    convolution = LowRank(numbers(3, 2, 1, 1, seed=3), numbers(2, 5, 1, 1, seed=4))
    whole = stack([linear, convolution], [4, 3])
    assert whole.shape == (7, 5, 1, 1)
    assert torch.equal(whole.dense().flatten(1)[:4], linear.dense())


@every_case()
def test_cut_parts_of_any_kind_stack_to_the_same_change(name: str) -> None:
    case = CASES[name]()
    if case.base.shape[0] != ROWS:
        return
    try:
        parts = [case.change.take(0, 4), case.change.take(4, 12)]
        whole = stack(parts, [4, 8])
    except Unrepresentable:
        refused = {"oft, constrained", "vera", "adalora", "tokens", "experts"}
        assert name in refused or name.startswith("dora, columns") or name == "dora over lokr"
        return
    check_delta(whole, case)
    assert relative_error(case.change, whole, tuple(case.base.shape)) < 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "loha",
        "loha, convolution",
        "loha, core",
        "diff",
        "diff, bias",
        "oft",
        "ia3, rows",
        "ia3, rows added",
        "lokr",
    ],
)
def test_a_missing_part_changes_nothing_in_its_rows(name: str) -> None:
    case = CASES[name]()
    part = case.change.take(0, 4) if name == "ia3, rows" else case.change
    height = 4 if name == "ia3, rows" else ROWS
    whole = stack([None, part], [8, height])
    base = torch.cat([numbers(8, *case.base.shape[1:], seed=5), case.base[:height]])
    delta = whole.dense(base, torch.float64)
    assert not delta[:8].any()
    check_close(base[8:] + delta[8:], case.expected[:height])


@pytest.mark.parametrize("name", ["set", "glora", "oft_input", "boft_input", "ia3, columns", "dora, rows"])
def test_what_cannot_spare_the_rows_of_a_missing_part_is_refused(name: str) -> None:
    with pytest.raises(Unrepresentable):
        stack([CASES[name]().change, None], [ROWS, 4])


@pytest.mark.parametrize("name", ["loha", "loha, convolution", "loha, core"])
def test_lohas_of_different_factors_stack_by_blocks(name: str) -> None:
    case = CASES[name]()
    change = case.change
    other = dataclasses.replace(
        change, **{role: tensor + 1 for role, tensor in change.tensors().items()}, scale=0.75
    )
    whole = stack([change, other, change], [ROWS, ROWS, ROWS])
    assert whole.rank is not None and change.rank is not None and whole.rank == 2 * change.rank
    deltas = [one.dense(dtype=torch.float64) for one in (change, other, change)]
    check_close(whole.dense(dtype=torch.float64), torch.cat(deltas))
    if "core" not in name:
        assert identical(whole.take(0, ROWS), change) and identical(whole.take(24, 36), change)


def test_lokrs_that_do_not_share_their_second_factor_are_refused() -> None:
    change = lokr().change
    other = dataclasses.replace(change, w2=change.tensors()["w2"] + 1)
    with pytest.raises(Unrepresentable, match="second factor") as caught:
        stack([change, other], [ROWS, ROWS])
    assert "--as lora" in caught.value.hint


def test_a_missing_part_that_is_no_whole_kronecker_block_is_refused() -> None:
    with pytest.raises(Unrepresentable, match="blocks of 4 rows"):
        stack([lokr().change, None], [ROWS, 3])


def test_a_constraint_that_binds_all_blocks_is_neither_cut_nor_stacked() -> None:
    """It binds a part as soon as one block has more than its share, though the whole stays below."""
    blocks = torch.zeros(3, 4, 4)
    blocks[0, 0, 1] = 0.1
    free = build("oft", {"blocks": blocks}, constraint=0.02)
    bound = build("oft", {"blocks": blocks}, constraint=0.01)
    with pytest.raises(Unrepresentable, match="constraint"):
        free.take(0, 4)
    assert identical(stack([free.take(4, 8), free.take(8, 12)], [4, 4]), free.take(4, 12))
    for other in (bound, dataclasses.replace(free, constraint=0.03)):
        with pytest.raises(Unrepresentable, match="constraint"):
            stack([free, other], [ROWS, ROWS])
    with pytest.raises(Unrepresentable, match="constraint"):
        stack([bound, bound], [ROWS, ROWS])


def test_kinds_do_not_stack_with_each_other() -> None:
    with pytest.raises(Unrepresentable, match="LoKr and LoRA"):
        stack([lokr().change, lora().change], [ROWS, ROWS])
    with pytest.raises(Unrepresentable):
        stack([CASES["diff"]().change, CASES["set"]().change], [ROWS, ROWS])


def test_nothing_cannot_be_stacked_and_heights_must_fit() -> None:
    part = parts_of(2)[0]
    with pytest.raises(UsageError):
        stack([None, None], [4, 4])
    with pytest.raises(UsageError):
        stack([part], [4, 4])
    with pytest.raises(Mismatch, match="4x7"):
        stack([part, part], [4, 5])
    with pytest.raises(Mismatch):
        stack([part, LowRank(numbers(4, 2, seed=1), numbers(2, 8, seed=2))], [4, 4])


# Sums, transposes, scales


def test_a_sum_puts_ranks_side_by_side() -> None:
    first, second = parts_of(2, 3, scales=(0.5, 2.0))
    second = dataclasses.replace(second, up=second.up[:4])
    total = add([first, second])
    assert isinstance(total, LowRank) and total.rank == 5 and total.scale == 0.5
    check_close(total.dense(), first.dense() + second.dense(), 1e-6)


@every_case()
def test_any_change_without_a_base_adds_to_a_lora(name: str) -> None:
    case = CASES[name]()
    if len(case.base.shape) != 2 or case.base.shape[0] != ROWS:
        return
    other = LowRank(numbers(ROWS, 2, seed=31), numbers(2, case.base.shape[1], seed=32), 0.3)
    if case.change.needs_base:
        with pytest.raises(Unrepresentable):
            add([case.change, other])
        return
    total = add([case.change, other])
    expected = case.change.dense(dtype=torch.float64) + other.dense(dtype=torch.float64)
    check_close(total.dense(dtype=torch.float64), expected, 1e-6)


def test_whole_deltas_add_to_one() -> None:
    a, b = (
        Whole(numbers(5, seed=seed, dtype=torch.bfloat16), scale=scale)
        for seed, scale in ((1, 1.0), (2, 0.5))
    )
    total = add([a, b])
    assert isinstance(total, Whole) and torch.equal(total.value, a.value.float() + b.value.float() * 0.5)
    with pytest.raises(Mismatch):
        add([a, Whole(numbers(6, seed=1))])
    with pytest.raises(UsageError):
        add([])


@pytest.mark.parametrize("name", ["lora", "embedding", "diff", "diff, bias", "dora, rows", "dora, columns"])
def test_the_transposed_change_changes_the_transposed_weight(name: str) -> None:
    case = CASES[name]()
    base, expected = (tensor.T if tensor.ndim == 2 else tensor for tensor in (case.base, case.expected))
    turned = transpose(case.change)
    check_close(base + turned.dense(base, torch.float64), expected)
    assert identical(transpose(turned), case.change)


@pytest.mark.parametrize("name", ["lora, convolution", "lora, mid", "loha", "lokr", "oft", "ia3, rows"])
def test_other_changes_have_no_transposed_form(name: str) -> None:
    with pytest.raises(Unrepresentable):
        transpose(CASES[name]().change)


@every_case()
def test_a_folded_change_has_scale_one_and_is_the_same(name: str) -> None:
    case = CASES[name]()
    folded, _ = fold(case.change)
    inner = folded.inner if isinstance(folded, Magnitude) else folded
    assert getattr(inner, "scale", 1.0) == 1.0
    assert set(folded.tensors()) == set(case.change.tensors())
    check_delta(folded, case, tolerance=0.05 if "eight" in name else 1e-3 if "half" in name else 1e-12)


@pytest.mark.parametrize(
    "scale, dtype, exact",
    [
        (1.0, torch.float16, True),
        (0.25, torch.float16, True),
        (4.0, torch.bfloat16, True),
        (1 / 3, torch.float32, False),
        (0.75, torch.float32, False),
        (0.5, torch.float64, True),
        (1 / 3, torch.float64, False),
        (2.0**-20, torch.float16, False),
        (2.0**20, torch.float16, False),
    ],
)
def test_folding_says_whether_a_bit_was_lost(scale: float, dtype: torch.dtype, exact: bool) -> None:
    up = numbers(6, 2, seed=1, dtype=dtype)
    folded, said = fold(LowRank(up, numbers(2, 5, seed=2, dtype=dtype), scale))
    assert said is exact
    assert isinstance(folded, LowRank) and folded.up.dtype == dtype
    restored = (folded.up.double() / scale).to(dtype)
    assert torch.equal(restored, up) or not exact


def test_few_bits_times_few_bits_fold_exactly_and_zeros_always_do() -> None:
    eighths = LowRank(torch.tensor([[0.5], [1.25]], dtype=torch.float16), torch.ones(1, 3), 0.75)
    assert fold(eighths)[1] is True
    untrained = LowRank(torch.zeros(2, 1, dtype=torch.float16), torch.ones(1, 3), 1 / 3)
    assert fold(untrained)[1] is True
    assert fold(dataclasses.replace(eighths, scale=0.0))[1] is False


def test_a_lossy_fold_can_be_made_in_another_dtype() -> None:
    change = LowRank(
        torch.full((2, 1), 6e-8, dtype=torch.float16), torch.ones(1, 3, dtype=torch.float16), 1 / 64
    )
    assert fold(change)[1] is False
    folded, exact = fold(change, torch.float32)
    assert exact and torch.equal(folded.dense(), change.dense())


def test_folding_an_integer_makes_it_a_float() -> None:
    folded, _ = fold(Whole(torch.tensor([1, 2, 3]), scale=0.5))
    assert isinstance(folded, Whole) and torch.equal(folded.value, torch.tensor([0.5, 1.0, 1.5]))


# Comparing


@every_case()
def test_a_change_differs_from_itself_by_nothing(name: str) -> None:
    assert relative_error(CASES[name]().change, CASES[name]().change) == 0.0


@every_case()
def test_a_small_difference_is_measured(name: str) -> None:
    case = CASES[name]()
    role, tensor = max(case.change.tensors().items(), key=lambda pair: pair[1].numel())
    moved = tensor.double().clone()
    moved[tuple(size // 2 for size in moved.shape[:-1])][..., 0] += 1e-3
    other = _with_role(case.change, role, moved)
    error = relative_error(case.change, other, tuple(case.base.shape))
    assert 1e-7 < error < 0.05


def _with_role(change: Change, role: str, tensor: Tensor) -> Change:
    if isinstance(change, Magnitude):
        if role == "magnitude":
            return dataclasses.replace(change, vector=tensor)
        return dataclasses.replace(change, inner=_with_role(change.inner, role, tensor))
    names = {field.metadata.get("role", field.name): field.name for field in dataclasses.fields(change)}
    return dataclasses.replace(change, **{names[role]: tensor})


@every_case()
def test_a_low_rank_form_measures_as_the_same(name: str) -> None:
    case = CASES[name]()
    if not case.change.needs_base and case.change.expanded_rank is not None:
        assert relative_error(case.change, case.change.low_rank()) < 1e-14


def test_the_error_of_factors_is_that_of_the_products() -> None:
    a, b = (
        LowRank(numbers(40, 3, seed=1), numbers(3, 30, seed=2), 0.5),
        LowRank(numbers(40, 4, seed=3), numbers(4, 30, seed=4), 2.0),
    )
    expected = float(
        (a.dense(dtype=torch.float64) - b.dense(dtype=torch.float64)).norm()
        / a.dense(dtype=torch.float64).norm()
    )
    assert relative_error(a, b) == pytest.approx(expected, rel=1e-12)
    assert norm(a) == pytest.approx(float(a.dense(dtype=torch.float64).norm()), rel=1e-12)
    flat_a, flat_b = a.dense(dtype=torch.float64).flatten(), b.dense(dtype=torch.float64).flatten()
    assert cosine(a, b) == pytest.approx(
        float(torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=0)), rel=1e-10
    )


def test_factors_that_differ_in_their_last_bits_differ_by_those() -> None:
    a = LowRank(numbers(40, 3, seed=1), numbers(3, 30, seed=2))
    b = dataclasses.replace(a, up=a.up * (1 + 2**-50))
    assert 0 < relative_error(a, b) < 1e-14


def test_shapes_zeros_and_numbers_that_are_none_are_told_apart() -> None:
    a = LowRank(numbers(40, 3, seed=1), numbers(3, 30, seed=2))
    zero = dataclasses.replace(a, up=torch.zeros_like(a.up))
    other_zero = dataclasses.replace(zero, down=a.down + 1)
    broken = dataclasses.replace(a, up=torch.full_like(a.up, math.nan))
    assert relative_error(a, LowRank(numbers(41, 3, seed=1), a.down)) == math.inf
    assert relative_error(a, LowRank(a.up, numbers(3, 31, seed=1))) == math.inf
    assert relative_error(zero, other_zero) == 0.0
    assert relative_error(zero, a) == math.inf
    assert relative_error(a, zero) == pytest.approx(1.0)
    assert relative_error(a, broken) == math.inf == relative_error(broken, a)
    assert relative_error(broken, broken) == 0.0
    assert cosine(zero, a) == 0.0 and cosine(a, a) == pytest.approx(1.0)
    with pytest.raises(Mismatch):
        cosine(a, LowRank(a.up, numbers(3, 31, seed=1)))


def test_a_conv_of_ones_is_the_linear_layer_it_is() -> None:
    linear = LowRank(numbers(40, 3, seed=1), numbers(3, 30, seed=2))
    convolution = LowRank(linear.up[..., None, None], linear.down[..., None, None])
    assert relative_error(linear, convolution) < 1e-15


def test_changes_of_an_unknown_weight_need_its_shape() -> None:
    a, b = Scaling(numbers(6, seed=1), on_input=True), Scaling(numbers(6, seed=2), on_input=True)
    with pytest.raises(UsageError):
        relative_error(a, b)
    assert relative_error(a, b, (4, 6)) > 0.1
    assert relative_error(a, b, (4, 6)) == relative_error(a, b, (4, 6))
    with pytest.raises(UsageError):
        norm(a)


# Building


def test_a_magnitude_lies_along_the_axis_that_its_shape_says() -> None:
    roles = {"up": numbers(6, 2, seed=1), "down": numbers(2, 6, seed=2)}
    for shape, axis in (((6, 1), "out"), ((1, 6), "in"), ((6,), "out")):
        change = build("lora", {**roles, "magnitude": numbers(*shape, seed=3)})
        assert isinstance(change, Magnitude) and change.axis == axis
    peft = build("lora", {**roles, "magnitude": numbers(1, 6, 1, 1, seed=3)}, axis="out")
    assert isinstance(peft, Magnitude) and peft.axis == "out"


def test_a_row_without_length_stays_zero_under_a_magnitude() -> None:
    change = Magnitude(LowRank(torch.zeros(3, 1), torch.ones(1, 4)), torch.ones(3))
    assert not change.dense(torch.zeros(3, 4)).any()


def test_a_scalar_multiplies_the_scale() -> None:
    roles = {"up": numbers(6, 2, seed=1), "down": numbers(2, 6, seed=2), "scalar": torch.tensor(0.5)}
    change = build("lora", roles, scale=0.5)
    assert isinstance(change, LowRank) and change.scale == 0.25


def test_the_first_gloras_had_their_factors_the_other_way_round() -> None:
    new = CASES["glora"]().change
    held = new.tensors()
    old = {"a1": held["a2"], "a2": held["a1"], "b1": held["b2"], "b2": held["b1"]}
    assert identical(build("glora", old, scale=0.5), new)


def test_lycoris_says_in_a_tensor_that_ia3_scales_the_input() -> None:
    for flag in (0, 1):
        change = build("ia3", {"vector": numbers(6, seed=1), "on_input": torch.tensor(flag)})
        assert isinstance(change, Scaling) and change.on_input is bool(flag) and change.additive
        assert set(change.tensors()) == {"vector", "on_input"}
    peft = build("ia3", {"vector": numbers(1, 6, seed=1)})
    assert isinstance(peft, Scaling) and peft.on_input and not peft.additive
    convolution = build("ia3", {"vector": numbers(1, 6, 1, 1, seed=1)}, weight_shape=(6, 4, 3, 3))
    assert isinstance(convolution, Scaling) and not convolution.on_input
    with pytest.raises(UsageError):
        build("ia3", {"vector": numbers(1, 6, 1, 1, seed=1)}, weight_shape=(6, 6, 3, 3))


def test_a_weight_is_widened_with_zeros() -> None:
    change = build("reshape", {"shape": torch.tensor([3, 5])})
    assert isinstance(change, Reshape) and change.shape == (3, 5)
    base = numbers(3, 2, seed=1)
    wide = change.widened(base)
    assert torch.equal(wide[:, :2], base) and not wide[:, 2:].any() and not change.dense(wide).any()
    with pytest.raises(Mismatch):
        change.widened(numbers(4, 2, seed=1))


def test_token_rows_without_their_places_are_carried_only() -> None:
    change = build("tokens", {"rows": numbers(2, 4, seed=1)})
    assert isinstance(change, Tokens)
    with pytest.raises(UsageError, match="which tokens"):
        change.dense(numbers(9, 4, seed=2))
    with pytest.raises(Unrepresentable):
        change.take(0, 4)


def test_tlora_is_carried_only() -> None:
    roles = {"p": numbers(6, 2, seed=1), "q": numbers(2, 5, seed=2), "lambda": numbers(1, 2, seed=3)}
    change = build("tlora", roles)
    assert isinstance(change, TLora) and set(change.tensors()) == set(roles) and change.shape == (6, 5)
    for attempt in (lambda: change.dense(numbers(6, 5, seed=4)), change.low_rank, lambda: change.take(0, 3)):
        with pytest.raises(Unrepresentable):
            attempt()


def test_vera_without_its_shared_matrices_says_so() -> None:
    with pytest.raises(Unrepresentable, match="shared matrices"):
        build("vera", {"b": numbers(6, seed=1), "d": numbers(2, seed=2)}).dense()


def test_an_adalora_pruned_to_no_rank_changes_nothing() -> None:
    roles = {"up": numbers(6, 0, seed=1), "down": numbers(0, 5, seed=1), "e": numbers(0, 1, seed=1)}
    assert not build("adalora", roles).dense().any()


LORA = {"up": (6, 2), "down": (2, 5)}
LOHA = {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 2), "w2_b": (2, 5)}


@pytest.mark.parametrize(
    "kind, shapes, said",
    [
        ("lora", {"up": (6, 3), "down": (2, 5)}, "6x3.*2x5.*ranks 3 and 2 differ"),
        ("lora", {"up": (6, 0), "down": (0, 5)}, "6x0: not a matrix"),
        ("lora", {"up": (6,), "down": (2, 5)}, "matrix"),
        ("lora", {"up": (6, 2, 3, 3), "down": (2, 5, 1, 1)}, "kernel belongs to down"),
        ("lora", {**LORA, "mid": (3, 2, 3, 3)}, "rank of up"),
        ("lora", {**LORA, "mid": (2, 3, 3, 3)}, "down's rank"),
        ("lora", {**LORA, "magnitude": (5,)}, "not one length per row"),
        ("loha", {**LOHA, "w1_b": (3, 5)}, "ranks 2 and 3 differ"),
        ("loha", {**LOHA, "w2_a": (7, 2)}, "rows differ"),
        ("loha", {**LOHA, "w2_b": (2, 6)}, "columns differ"),
        ("loha", {**LOHA, "t1": (3, 2, 3, 3), "t2": (2, 2, 3, 3)}, "ranks"),
        ("lokr", {"w1": (2, 2), "w2_a": (3, 2), "w2_b": (3, 4)}, "ranks 2 and 3 differ"),
        ("lokr", {"w1_a": (2, 2), "w1_b": (1, 2), "w2": (3, 3)}, "ranks differ"),
        ("glora", {"a1": (5, 2), "a2": (3, 5), "b1": (6, 2), "b2": (2, 5)}, "5x2.*3x5"),
        ("glora", {"a1": (4, 2), "a2": (2, 4), "b1": (6, 2), "b2": (2, 5)}, "input channels differ"),
        ("oft", {"blocks": (2, 3, 4)}, "not square"),
        ("oft", {"blocks": (2, 3, 3), "rescale": (5, 1)}, "rows differ"),
        ("oft_input", {"blocks": (2, 5)}, "no triangles"),
        ("boft_input", {"blocks": (2, 3, 3), "rescale": (6, 1)}, "stages"),
        ("ia3", {"vector": (2, 3)}, "not one number"),
        ("adalora", {**LORA, "e": (3, 1)}, "not one value per rank"),
        ("tokens", {"rows": (3,)}, "3"),
        ("tlora", {"p": (6, 2), "q": (3, 5), "lambda": (1, 3)}, "ranks differ"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_both_shapes(
    kind: str, shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    with pytest.raises(Mismatch, match=said):
        build(kind, {role: numbers(*shape, seed=1) for role, shape in shapes.items()})


@pytest.mark.parametrize(
    "name", ["lora", "loha", "lokr", "glora", "oft", "oft_input", "boft_input", "diff", "ia3, rows"]
)
def test_a_weight_of_another_shape_is_refused(name: str) -> None:
    case = CASES[name]()
    kind = case.change.kind
    facts = {"on_input": False} if kind == "ia3" else {}
    with pytest.raises(Mismatch):
        build(kind, case.change.tensors(), weight_shape=(24, 7), **facts)  # type: ignore[arg-type]
    with pytest.raises(Mismatch):
        case.change.dense(numbers(24, 7, seed=1))


@pytest.mark.parametrize(
    "kind, shapes, facts",
    [
        ("lorra", LORA, {}),
        ("lora", {"up": (6, 2)}, {}),
        ("lora", {**LORA, "w1": (2, 2)}, {}),
        ("lora", LORA, {"constraint": 1.0}),
        ("lora", {**LORA, "magnitude": (6,)}, {"axis": "rows"}),
        ("oft", {"blocks": (2, 3, 3)}, {"scale": 2.0}),
        ("loha", {**LOHA, "t1": (2, 2, 3, 3)}, {}),
        ("lokr", {"w1": (2, 2), "w2": (3, 3), "w2_a": (3, 2)}, {}),
        ("lokr", {"w1": (2, 2), "w2": (3, 3), "t2": (3, 2, 3, 3)}, {}),
    ],
)
def test_roles_and_facts_that_a_kind_does_not_have_are_refused(
    kind: str, shapes: dict[str, tuple[int, ...]], facts: dict[str, object]
) -> None:
    with pytest.raises(UsageError):
        build(kind, {role: numbers(*shape, seed=1) for role, shape in shapes.items()}, **facts)  # type: ignore[arg-type]


def test_every_kind_has_a_class_and_a_case() -> None:
    covered = {CASES[name]().change.kind for name in CASES} | {"reshape", "tlora"}
    assert covered >= set(KINDS)


ODD_SHAPES: list[tuple[int, ...]] = [
    *((), (0,), (1,), (7,), (12, 0), (0, 6), (5, 7), (1, 1), (2, 3, 4), (0, 0, 0), (1, 2, 3, 3))
]


@every_case()
def test_a_tensor_of_any_other_shape_is_refused_or_understood_but_breaks_nothing(name: str) -> None:
    case = CASES[name]()
    inner = case.change.inner if isinstance(case.change, Magnitude) else case.change
    facts = {
        field.name: getattr(inner, field.name)
        for field in dataclasses.fields(inner)
        if field.name not in {"weight_shape", "scale", "replaces", "flag"}
        and field.metadata.get("role", field.name) not in case.change.tensors()
        and not isinstance(getattr(inner, field.name), Tensor | None)
    }
    for role in case.change.tensors():
        for shape in (
            (),
            (0,),
            (1,),
            (7,),
            (12, 0),
            (0, 6),
            (5, 7),
            (1, 1),
            (2, 3, 4),
            (0, 0, 0),
            (1, 2, 3, 3),
        ):
            roles = {**case.change.tensors(), role: torch.zeros(shape)}
            try:
                change = build(inner.kind, roles, **facts)
                change.dense(case.base)
                change.take(0, 4)
            except AdapterkitError as error:
                assert error.message
