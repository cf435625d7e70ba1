"""Rounding once: to the nearest number or by chance, never to something that is no number."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.errors import UsageError
from adapterkit.linalg.rounding import beyond, fp8_scale, round_scaled, round_to, seed_of

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
NARROW = [torch.float16, torch.bfloat16, *FP8]
MANTISSA = {torch.float16: 10, torch.bfloat16: 7}


def numbers_of(dtype: torch.dtype) -> np.ndarray:
    """Every finite number of a dtype, from its codes, in order; even places have an even code."""
    codes = torch.arange(2 ** (8 * dtype.itemsize - 1), dtype=torch.int32)
    positive = codes.to(torch.int16 if dtype.itemsize == 2 else torch.uint8).view(dtype).double().numpy()
    return positive[np.isfinite(positive)]


def nearest(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The nearest of all numbers of the dtype, of two equally near the one with the even code."""
    grid = numbers_of(dtype)
    size = np.abs(values)
    above = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    to_lower, to_upper = size - grid[above - 1], grid[above] - size
    upper = (to_upper < to_lower) | ((to_upper == to_lower) & (above % 2 == 0))
    return np.copysign(np.where(upper, grid[above], grid[above - 1]), values)


def hard_values(dtype: torch.dtype) -> torch.Tensor:
    """Numbers of the dtype, the middles between them, what is just beside those, and what is beyond."""
    grid = torch.from_numpy(numbers_of(dtype)).float()
    middle = grid[:-1] + (grid[1:] - grid[:-1]) / 2
    beside = [torch.nextafter(middle, middle + sign) for sign in (1, -1)]
    largest = torch.finfo(dtype).max
    tall = torch.tensor([1.001, 1.03, 1.1, 2.0]) * largest
    all_of_them = torch.cat([grid, middle, *beside, tall[tall.isfinite()]])
    return torch.cat([all_of_them, -all_of_them])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_nearest_is_the_nearest_of_all_numbers_and_ties_go_to_even(dtype: torch.dtype) -> None:
    values = hard_values(dtype)
    rounded = round_to(values, dtype)
    assert rounded.dtype == dtype
    assert np.array_equal(rounded.double().numpy(), nearest(values.double().numpy(), dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_chance_chooses_between_the_two_neighbours_and_leaves_what_fits(dtype: torch.dtype) -> None:
    values = hard_values(dtype)
    grid = numbers_of(dtype)
    size = np.minimum(values.abs().double().numpy(), grid[-1])
    lower = grid[np.searchsorted(grid, size, side="right") - 1]
    upper = grid[np.searchsorted(grid, size)]
    for seed in range(4):
        rounded = round_to(values, dtype, "stochastic", seed_of("w", seed)).double().numpy()
        assert np.all((np.abs(rounded) == lower) | (np.abs(rounded) == upper))
        assert np.all(rounded * np.sign(values.numpy()) >= 0)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("share", [1 / 16, 0.3, 0.5, 0.9])
def test_chance_is_right_in_the_mean(dtype: torch.dtype, share: float) -> None:
    """How often a number goes up is its place between its neighbours: over seeds, and over places."""
    grid = numbers_of(dtype)
    # A subnormal number, a small one and one of the middle of the range.
    for at in (2, len(grid) // 4, len(grid) // 2):
        value = torch.tensor(grid[at] + share * (grid[at + 1] - grid[at]), dtype=torch.float32)
        chance = (float(value) - grid[at]) / (grid[at + 1] - grid[at])
        count, seeds = 2048, 32
        went_up = sum(
            int(
                (
                    round_to(value.repeat(count), dtype, "stochastic", seed_of("w", s)).double() > grid[at]
                ).sum()
            )
            for s in range(seeds)
        )
        deviation = np.sqrt(chance * (1 - chance) / (count * seeds))
        assert abs(went_up / (count * seeds) - chance) < 5 * deviation


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 600), max_size=6), seed=st.integers(0, 2**64 - 1))
def test_blocks_of_any_size_round_like_the_whole(cuts: list[int], seed: int) -> None:
    value = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).reshape(-1)
    whole = round_to(value, torch.bfloat16, "stochastic", seed)
    bounds = [0, *sorted(cuts), 600]
    blocks = [round_to(value[a:b], torch.bfloat16, "stochastic", seed, start=a) for a, b in pairwise(bounds)]
    assert torch.equal(torch.cat(blocks), whole)


def test_a_place_beyond_32_bits_has_its_chance_too() -> None:
    value = torch.full((4096,), 1.3)
    far = round_to(value, torch.bfloat16, "stochastic", 7, start=2**32 - 2048)
    assert torch.equal(far[2048:], round_to(value[:2048], torch.bfloat16, "stochastic", 7))


def middle() -> torch.Tensor:
    """Many numbers in the middle of two."""
    return torch.full((1 << 16,), 1 + 2.0**-8)


def ups(key: str, seed: int = 0) -> torch.Tensor:
    """±1 for each of them, as it went up or down."""
    return (round_to(middle(), torch.bfloat16, "stochastic", seed_of(key, seed)) > 1).double() * 2 - 1


def test_chance_is_the_same_for_a_key_and_another_for_each() -> None:
    assert torch.equal(ups("a"), ups("a"))
    high = round_to(middle(), torch.bfloat16, "stochastic", seed_of("a", 0) ^ seed_of("b", 0) >> 32 << 32)
    others = [
        (high > 1).double() * 2 - 1,
        ups("b"),
        ups("a", seed=1),
        *(ups("a").roll(step) for step in (1, 2, 64, 320)),
    ]
    for other in others:
        # Five deviations of the mean of independent signs.
        assert abs(float((ups("a") * other).mean())) < 5 / 2**8


def test_seeds_of_keys_are_settled_for_all_time() -> None:
    """Figures from `printf '0\\0w' | sha256sum`: a bake must be repeatable by a later release."""
    assert seed_of("w", 0) == int.from_bytes(
        bytes.fromhex("b0298876735642782f112d2aeaf053ba10fecb2ea527e47ffe2f86ab3746c576")[:8], "little"
    )
    assert len({seed_of(key, seed) for key in ("w", "v", "0\0w") for seed in (0, 1, -1)}) == 9


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_is_finite_stays_finite_and_what_is_not_stays_so(how: str, dtype: torch.dtype) -> None:
    top = torch.finfo(torch.float32).max
    largest = torch.finfo(dtype).max
    value = torch.tensor([top, -top, torch.inf, -torch.inf, torch.nan, largest, 1.0])
    rounded = round_to(value, dtype, how, 3).float()  # type: ignore[arg-type]
    assert rounded[[0, 1, 5, 6]].tolist() == [largest, -largest, largest, 1.0]
    assert not rounded[2:5].isfinite().any()
    assert rounded[4].isnan()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_numbers_beyond_the_largest_are_counted(dtype: torch.dtype) -> None:
    grid = numbers_of(dtype)
    halfway = float(grid[-1] + (grid[-1] - grid[-2]) / 2)
    value = torch.tensor([0.0, float(grid[-1]), -halfway, torch.inf, torch.nan, halfway * (1 - 1e-6)])
    # Half a step above the largest, IEEE rounding begins to give infinity.
    assert beyond(value, dtype) == (1 if np.isfinite(np.float32(halfway)) else 0)
    assert beyond(value[:2], dtype) == 0
    assert beyond(value[:0], dtype) == 0


def test_float32_is_left_as_it_is() -> None:
    value = torch.tensor([1.1, torch.inf, torch.nan, 1e-45])
    assert torch.equal(
        round_to(value, torch.float32, "stochastic", 5).view(torch.int32), value.view(torch.int32)
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e8m0fnu, torch.float64, torch.bool], ids=str)
def test_a_dtype_that_weights_cannot_be_rounded_to_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match="cannot be rounded"):
        round_to(torch.ones(2), dtype)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("scale", [0.00123, 1.0, 77.7])
def test_codes_beside_a_scale_come_back_as_they_were(dtype: torch.dtype, scale: float) -> None:
    grid = torch.from_numpy(numbers_of(dtype)).float()
    for factor in (scale, torch.full((len(grid),), scale)):
        assert torch.equal(round_scaled(grid * factor, factor, dtype).float(), grid)


def test_a_scale_lets_the_largest_number_fill_the_dtype() -> None:
    value = torch.tensor([3.0, -0.01, 1.5])
    scale = fp8_scale(3.0, torch.float8_e4m3fn)
    assert round_scaled(value, scale, torch.float8_e4m3fn).float().max() == 448
    assert fp8_scale(0.0, torch.float8_e4m3fn) == 1


def test_no_numbers_round_to_none() -> None:
    assert round_to(torch.empty(0, 3), torch.float16, "stochastic").shape == (0, 3)
