"""What is left of a change after rounding, held against float64 and against the arithmetic of grids."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from adapterkit.baking.survival import Kept, Survival
from adapterkit.linalg.rounding import round_to, seed_of


def weights(change: float, dtype: torch.dtype = torch.bfloat16, rows: int = 256) -> tuple[torch.Tensor, ...]:
    """A weight in a dtype, and weight and low-rank change of that rms, in float32."""
    random = torch.Generator().manual_seed(1)
    before = (torch.randn(rows, 128, generator=random) * 0.02).to(dtype)
    up, down = torch.randn(rows, 4, generator=random), torch.randn(4, 128, generator=random)
    return before, before.float() + change / 2 * up @ down


def oracle(before: torch.Tensor, wanted: torch.Tensor, after: torch.Tensor) -> tuple[float, float, float]:
    """Ratio, cosine and norm in numpy's float64."""
    change = (wanted.double() - before.double()).numpy().ravel()
    given = (after.double() - before.double()).numpy().ravel()
    ratio = given @ change / (change @ change)
    return ratio, ratio * np.linalg.norm(change) / np.linalg.norm(given), float(np.linalg.norm(change))


def survival_of(*blocks: tuple[str, torch.Tensor, torch.Tensor, torch.Tensor], step: int = 1) -> Survival:
    survival = Survival(step)
    for block in blocks:
        survival.add(*block)
    return survival


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32], ids=str
)
@pytest.mark.parametrize("change", [1e-5, 1e-4, 1e-2])
def test_the_figures_are_those_of_float64(dtype: torch.dtype, change: float) -> None:
    before, wanted = weights(change)
    after = round_to(wanted, dtype)
    kept = survival_of(("w", before, wanted, after)).modules["w"]
    assert (kept.ratio, kept.cosine, kept.norm) == pytest.approx(
        oracle(before, wanted, after), rel=1e-5, abs=1e-6
    )
    assert kept.numbers == wanted.numel()


def test_a_change_far_below_the_steps_is_lost_and_one_far_above_is_kept() -> None:
    before, wanted = weights(1e-7)
    assert survival_of(("w", before, wanted, round_to(wanted, torch.bfloat16))).total.ratio < 0.02
    before, wanted = weights(1e-2)
    assert survival_of(("w", before, wanted, round_to(wanted, torch.bfloat16))).total.ratio > 0.999


def test_rounding_by_chance_keeps_a_change_that_the_nearest_loses() -> None:
    before, wanted = weights(3e-6)
    nearest = survival_of(("w", before, wanted, round_to(wanted, torch.bfloat16))).total
    chance = round_to(wanted, torch.bfloat16, "stochastic", seed_of("w", 0))
    by_chance = survival_of(("w", before, wanted, chance)).total
    assert nearest.ratio < 0.2
    assert by_chance.ratio == pytest.approx(1, abs=0.15)
    # The price is noise: much is added that nobody wanted.
    assert by_chance.cosine < 0.5


def test_a_half_and_a_doubled_change_count_as_such() -> None:
    before, wanted = torch.zeros(4, 4), torch.ones(4, 4)
    assert survival_of(("w", before, wanted, wanted / 2)).total == Kept(0.5, 1.0, 4.0, 16)
    assert survival_of(("w", before, wanted, wanted * 2)).total == Kept(2.0, 1.0, 4.0, 16)
    assert survival_of(("w", before, wanted, -wanted)).total == Kept(-1.0, -1.0, 4.0, 16)
    assert survival_of(("w", before, wanted, before)).total == Kept(0.0, 0.0, 4.0, 16)


def test_where_nothing_was_wanted_all_is_kept() -> None:
    before = torch.randn(3, 4)
    assert survival_of(("w", before, before, before.half())).total == Kept(1.0, 1.0, 0.0, 12)
    assert Survival().total == Kept(1.0, 1.0, 0.0, 0)
    assert survival_of(("w", before[:0], before[:0], before[:0])).modules == {}


def test_blocks_in_any_order_and_from_any_thread_give_the_very_same_figures() -> None:
    before, wanted = weights(1e-4)
    after = round_to(wanted, torch.bfloat16)
    blocks = [("w", before[i : i + 16], wanted[i : i + 16], after[i : i + 16]) for i in range(0, 256, 16)]
    first = survival_of(*blocks)
    assert first.modules == survival_of(*reversed(blocks)).modules
    threaded = Survival()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda block: threaded.add(*block), blocks))
    assert (threaded.total, threaded.predicted) == (first.total, first.predicted)
    whole = survival_of(("w", before, wanted, after)).total
    assert first.total.ratio == pytest.approx(whole.ratio, rel=1e-6)


def test_the_total_weighs_modules_by_the_size_of_their_changes() -> None:
    large, small = (torch.zeros(2, 2), torch.full((2, 2), 3.0)), (torch.zeros(2, 2), torch.ones(2, 2))
    survival = survival_of(("large", *large, large[1]), ("small", *small, small[0]))
    assert survival.total.ratio == pytest.approx(0.9)
    assert survival.total.norm == pytest.approx(math.hypot(6, 2))
    assert survival.below(0.5) == ("small",)
    assert list(survival.modules) == ["large", "small"]


def test_modules_below_a_threshold_come_worst_first_and_what_is_no_number_before_all() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    nan = torch.full((2,), torch.nan)
    shares = {"half": 0.5, "none": 0.0, "most": 0.9}
    survival = survival_of(
        ("broken", zero, nan, nan), *((key, zero, one, one * share) for key, share in shares.items())
    )
    assert survival.below(0.8) == ("broken", "none", "half")
    assert math.isnan(survival.total.ratio)


def test_infinities_of_both_signs_make_no_figure_and_no_error() -> None:
    value = torch.tensor([torch.inf, -torch.inf])
    survival = survival_of(("a", torch.zeros(2), value, value), ("b", torch.zeros(2), value, -value))
    assert math.isnan(survival.total.ratio)


@pytest.mark.parametrize("change", [1e-5, 3e-5, 1e-3])
def test_a_prediction_is_what_the_dtype_then_keeps(change: float) -> None:
    before, wanted = weights(change, torch.float32, rows=2048)
    survival = survival_of(("w", before, wanted, round_to(wanted, torch.float8_e4m3fn)))
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        real = oracle(before, wanted, round_to(wanted, dtype))
        assert survival.predicted[name].ratio == pytest.approx(real[0], abs=0.05)


@pytest.mark.parametrize(("change", "name"), [(1e-2, "bf16"), (1e-5, "fp16"), (1e-8, "fp32")])
def test_the_narrowest_dtype_that_keeps_the_change_is_named(change: float, name: str) -> None:
    before, wanted = weights(change)
    assert survival_of(("w", before, wanted, round_to(wanted, torch.float8_e4m3fn))).would_keep(0.95) == name


def test_a_dtype_for_which_numbers_are_too_large_is_not_named() -> None:
    before, wanted = weights(1e-5)
    before[0, 0] = 1e6
    wanted[0, 0] = before[0, 0]
    survival = survival_of(("w", before, wanted, round_to(wanted, torch.float16)))
    assert survival.total.ratio > 0.95
    assert survival.total.beyond == 1
    assert survival.predicted["bf16"].ratio < 0.95
    assert survival.would_keep(0.95) == "fp32"


def test_measuring_every_few_rows_estimates_the_same_figures() -> None:
    before, wanted = weights(3e-5, rows=2048)
    after = round_to(wanted, torch.bfloat16)
    exact = survival_of(("w", before, wanted, after)).total
    some = survival_of(("w", before, wanted, after), step=8).total
    assert some.ratio == pytest.approx(exact.ratio, abs=0.03)
    assert some.norm == pytest.approx(exact.norm, rel=0.1)
    assert some.numbers == exact.numbers


def test_a_tensor_without_axes_is_measured_too() -> None:
    survival = survival_of(("s", torch.tensor(1.0), torch.tensor(1.5), torch.tensor(1.25)), step=4)
    assert survival.total == Kept(0.5, 1.0, 0.5, 1)
