"""The rules by which ranks are chosen, held against the best choice there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.errors import UsageError
from adapterkit.ranks import (
    RankRule,
    Spectrum,
    allocate,
    cost_of,
    left_out,
    parse_rank,
    parse_size,
)

COMMON = settings(max_examples=80, derandomize=True, deadline=None, database=None)


def spectrum(
    *values: float, cost: int = 1, layer: str = "linear", weight: float = 1.0, beyond: float = 0.0
) -> Spectrum:
    energy = math.fsum(value * value for value in values) + beyond
    full = len(values) if not beyond else len(values) + 5
    return Spectrum(values, energy, cost, layer, full, weight=weight)


@st.composite
def spectra(draw: st.DrawFn, longest: int = 6, most: int = 5) -> dict[int, Spectrum]:
    """A few modules with spectra, costs and weights of their own."""
    found = {}
    for key in range(draw(st.integers(1, most))):
        values = draw(st.lists(st.floats(0.01, 10), min_size=1, max_size=longest))
        found[key] = spectrum(
            *sorted(values, reverse=True),
            cost=draw(st.sampled_from([1, 3, 7, 20])),
            layer=draw(st.sampled_from(["linear", "conv"])),
            weight=draw(st.sampled_from([0.5, 1.0, 4.0])),
        )
    return found


def every_choice(modules: Mapping[int, Spectrum]) -> list[dict[int, int]]:
    return [
        dict(zip(modules, ranks, strict=True))
        for ranks in product(*(range(1, len(one.values) + 1) for one in modules.values()))
    ]


@COMMON
@given(spectra(), st.integers(1, 6))
def test_the_choice_for_a_size_is_never_worse_than_one_rank_for_all(
    modules: dict[int, Spectrum], rank: int
) -> None:
    same = allocate(modules, RankRule(rank=rank))
    chosen = allocate(modules, RankRule(size=cost_of(modules, same)))
    assert cost_of(modules, chosen) <= cost_of(modules, same)
    assert left_out(modules, chosen) <= left_out(modules, same) * (1 + 1e-12)


@COMMON
@given(spectra(longest=4, most=4), st.floats(0, 1))
def test_a_size_is_never_exceeded_and_what_is_left_would_not_hold_one_more_value(
    modules: dict[int, Spectrum], share: float
) -> None:
    least = cost_of(modules, dict.fromkeys(modules, 1))
    most = cost_of(modules, {key: one.full for key, one in modules.items()})
    size = max(1, int(least + share * (most - least)))
    chosen = allocate(modules, RankRule(size=size), fixed=0)
    assert cost_of(modules, chosen) <= size
    best = min(left_out(modules, one) for one in every_choice(modules) if cost_of(modules, one) <= size)
    largest = max(one.weight * value**2 for one in modules.values() for value in one.values)
    assert best - 1e-9 <= left_out(modules, chosen) <= best + largest


@COMMON
@given(spectra(longest=4, most=4), st.floats(0.01, 0.99))
def test_an_error_is_met_by_less_than_one_value_more_than_the_least_bytes(
    modules: dict[int, Spectrum], error: float
) -> None:
    chosen = allocate(modules, RankRule(error=error))
    permitted = error**2 * sum(one.weight * one.energy for one in modules.values())
    floors = dict.fromkeys(modules, 1)
    assert left_out(modules, chosen) <= permitted * (1 + 1e-9) or chosen == {
        k: m.full for k, m in modules.items()
    }
    fewest = min(
        cost_of(modules, c) for c in every_choice(modules) if left_out(modules, c) <= permitted * (1 + 1e-9)
    )
    assert (
        fewest <= cost_of(modules, chosen) < fewest + max(one.cost for one in modules.values())
        or chosen == floors
    )


@COMMON
@given(spectra(), st.floats(0.01, 1))
def test_an_energy_is_the_error_that_it_leaves(modules: dict[int, Spectrum], energy: float) -> None:
    chosen = allocate(modules, RankRule(energy=energy))
    other = allocate(modules, RankRule(error=math.sqrt(1 - energy))) if energy > 0 else chosen
    assert left_out(modules, chosen) == pytest.approx(left_out(modules, other), rel=1e-6, abs=1e-9)


def test_values_nobody_has_seen_count_as_left_out() -> None:
    # ‖delta‖² is 4 + 1 + 5; more than the tail of 5 can never be kept.
    assert left_out({0: spectrum(2, 1, beyond=5)}, {0: 2}) == pytest.approx(5)
    assert allocate({0: spectrum(2, 1, beyond=5)}, RankRule(error=0.01)) == {0: 2}


def staying(*values: float, beyond: float, weight: float = 1.0) -> Spectrum:
    return replace(spectrum(*values, beyond=beyond, weight=weight), stays=True)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RankRule(), 7),
        (RankRule(least=2), 7),
        (RankRule(rank={"conv": 1}), 7),
        (RankRule(energy=1.0), 7),
        (RankRule(error=0.01), 7),
        # 5 of 10 are left out at the least by what is known.
        (RankRule(error=0.75), 2),
        (RankRule(energy=0.4), 1),
        (RankRule(error=0.01, most=6), 2),
        (RankRule(most=6), 6),
        (RankRule(rank=4), 2),
        (RankRule(rank={"linear": 4}), 2),
        (RankRule(size=99), 2),
        (RankRule(auto=True), 2),
    ],
)
def test_a_change_that_can_stay_does_where_more_is_wanted_than_is_known(
    rule: RankRule, expected: int
) -> None:
    modules = {0: staying(2, 1, beyond=5)}
    assert allocate(modules, rule) == {0: expected}
    assert (left_out(modules, {0: 7}), left_out(modules, {0: 6})) == (0.0, pytest.approx(5))


def test_those_stay_first_that_lack_most_and_no_more_than_need_to() -> None:
    modules = {
        "little": staying(2, 1, beyond=0.1),
        "much": staying(2, 1, beyond=5),
        "weighty": staying(2, 1, beyond=1, weight=9),
        "factors": spectrum(2, 1),
    }
    total = math.fsum(one.weight * one.energy for one in modules.values())
    kept = allocate(modules, RankRule(error=math.sqrt(5.2 / total)))
    assert kept == {"little": 2, "much": 2, "weighty": 7, "factors": 2}
    kept = allocate(modules, RankRule(error=math.sqrt(0.2 / total)))
    assert kept == {"little": 2, "much": 7, "weighty": 7, "factors": 2}


def test_a_convolution_pays_for_its_kernel() -> None:
    """The same values: a rank of a linear layer is cheaper than one of a convolution."""
    modules = {"linear": spectrum(3, 2, 1, cost=20), "conv": spectrum(3, 2, 1, cost=100, layer="conv")}
    assert allocate(modules, RankRule(size=180)) == {"linear": 3, "conv": 1}
    # The largest value that is left is the convolution's; five others take as many bytes and save more.
    modules = {
        "conv": spectrum(3, 2.5, cost=100, layer="conv"),
        "linear": spectrum(3, 2, 2, 2, 2, 2, cost=20),
    }
    assert allocate(modules, RankRule(size=220)) == {"conv": 1, "linear": 6}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RankRule(rank=2), {"linear": 2, "conv": 2}),
        (RankRule(rank=9), {"linear": 4, "conv": 3}),
        (RankRule(rank={"conv": 1, "linear": 3}), {"linear": 3, "conv": 1}),
        (RankRule(rank={"conv": 1}), {"linear": 4, "conv": 1}),
        (RankRule(), {"linear": 4, "conv": 3}),
        (RankRule(most=2), {"linear": 2, "conv": 2}),
        (RankRule(rank=1, least=2), {"linear": 2, "conv": 2}),
        (RankRule(energy=1.0), {"linear": 4, "conv": 3}),
        (RankRule(error=0.0), {"linear": 4, "conv": 3}),
        (RankRule(energy=0.01, least=3), {"linear": 3, "conv": 3}),
    ],
)
def test_ranks_keep_to_the_rule_its_bounds_and_the_change(rule: RankRule, expected: dict[str, int]) -> None:
    modules = {"linear": spectrum(4, 3, 2, 1), "conv": spectrum(3, 2, 1, cost=5, layer="conv")}
    assert allocate(modules, rule) == expected


def test_auto_keeps_what_stands_out_of_the_noise_and_leaves_out_what_is_all_noise() -> None:
    values = (4.0, 3.0, 0.2, 0.1)
    modules = {
        noise: Spectrum(values, 25.05, 1, "linear", 4, noise=noise) for noise in (0.0, 0.15, 0.2, 1.0, 5.0)
    }
    assert allocate(modules, RankRule(auto=True)) == {0.0: 4, 0.15: 3, 0.2: 2, 1.0: 2, 5.0: 0}
    assert allocate(modules, RankRule(auto=True, least=3, most=3)) == {
        0.0: 3,
        0.15: 3,
        0.2: 3,
        1.0: 3,
        5.0: 0,
    }


@pytest.mark.parametrize(
    "rule", [RankRule(rank=4), RankRule(size=100), RankRule(error=0.1), RankRule(auto=True)]
)
def test_what_changes_nothing_is_left_out(rule: RankRule) -> None:
    modules = {"trained": spectrum(2, 1), "zero": Spectrum((0.0, 0.0), 0.0, 1, "linear", 0)}
    assert allocate(modules, rule)["zero"] == 0


def test_a_size_below_the_least_ranks_is_refused_with_the_smallest_possible() -> None:
    modules = {0: spectrum(2, 1, cost=40), 1: spectrum(2, 1, cost=60)}
    with pytest.raises(UsageError) as caught:
        allocate(modules, RankRule(size=149), fixed=50)
    assert caught.value.details == {"size": 149, "smallest": 150}
    assert allocate(modules, RankRule(size=150), fixed=50) == {0: 1, 1: 1}


def test_a_large_weight_draws_ranks() -> None:
    modules = {"near": spectrum(1, 1, 1), "far": spectrum(1, 1, 1, weight=9)}
    assert allocate(modules, RankRule(size=4)) == {"near": 1, "far": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", 16),
        (" 8 ", 8),
        ("conv=8,linear=16", {"conv": 8, "linear": 16}),
        ("linear=4", {"linear": 4}),
        ("auto", "auto"),
    ],
)
def test_ranks_are_read_as_they_are_typed(text: str, expected: object) -> None:
    assert parse_rank(text) == expected


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "", "conv", "conv=0", "conv=8,conv=8", "attention=8", "٣"]
)
def test_what_is_no_rank_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rank(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50MB", 50_000_000),
        ("47.5 MiB", 49_807_360),
        ("1048576", 1_048_576),
        ("900kB", 900_000),
        ("1gb", 10**9),
        ("3B", 3),
    ],
)
def test_sizes_are_read_in_the_units_people_use(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "50 parsecs", "-5MB", "1e9", "5,0MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0},
        {"rank": {"conv": 0}},
        {"energy": 1.5},
        {"energy": 0.0},
        {"energy": math.nan},
        {"error": 1.0},
        {"error": -0.1},
        {"size": 0},
        {"least": 0},
        {"least": 5, "most": 4},
        {"rank": 4, "energy": 0.9},
        {"auto": True, "size": 100},
    ],
)
def test_a_rule_without_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        RankRule(**values)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RankRule(rank=16), 16),
        (RankRule(rank={"conv": 8, "linear": 16}), 16),
        (RankRule(rank={"conv": 8}), None),
        (RankRule(energy=0.9), None),
        (RankRule(energy=0.9, most=64), 64),
        (RankRule(rank=16, most=8), 8),
    ],
)
def test_the_highest_rank_a_rule_can_give_is_known_before(rule: RankRule, expected: int | None) -> None:
    assert rule.highest == expected
