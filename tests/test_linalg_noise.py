"""What rounding and noise do to a spectrum is told before it is looked at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from torch import Tensor

from adapterkit.linalg import noise
from adapterkit.linalg.dense_svd import dense_svd
from adapterkit.linalg.noise import noise_deviation, noise_edge, rounding_noise
from adapterkit.linalg.product_svd import product_svd

SHAPES = [(300, 300), (200, 500), (500, 100)]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1.0),
        (torch.float32, 3e-6),
        (torch.float16, 1.0),
        (torch.float16, 0.02),
        # Beneath the least normal number.
        (torch.float16, 3e-6),
        (torch.bfloat16, 0.02),
        (torch.bfloat16, 3e-6),
        (torch.float8_e4m3fn, 1.0),
        (torch.float8_e4m3fn, 0.02),
        (torch.float8_e5m2, 0.02),
    ],
)
def test_the_error_of_rounding_is_told_from_the_rounded_numbers(dtype: torch.dtype, size: float) -> None:
    exact = numbers(400, 500, seed=1) * size
    stored = exact.to(dtype)
    made = float((stored.double() - exact).square().mean().sqrt())
    # On a grid as coarse as the numbers themselves errors are not spread evenly over a step.
    within = 0.01 if made < size / 100 else 0.1
    assert rounding_noise(stored) == pytest.approx(made, rel=within)


def test_whole_numbers_and_no_numbers_are_not_rounded() -> None:
    assert rounding_noise(torch.arange(5)) == 0.0
    assert rounding_noise(torch.zeros(0)) == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_has_no_singular_value_far_beyond_its_edge(shape: tuple[int, int]) -> None:
    values = np.linalg.svd(numbers(*shape, seed=1).numpy() * 0.3, compute_uv=False)
    assert values[0] == pytest.approx(noise_edge(0.3, shape), rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("known", ["all", "some"])
def test_the_deviation_of_noise_is_told_from_the_spectrum_around_a_signal(
    shape: tuple[int, int], known: str
) -> None:
    signal = numbers(shape[0], 5, seed=2) @ numbers(5, shape[1], seed=3)
    matrix = signal + 0.3 * numbers(*shape, seed=1)
    found = dense_svd(matrix, min(shape) if known == "all" else 10)
    assert noise_deviation(found) == pytest.approx(0.3, rel=0.05)
    # So the signal's rank is what stands out.
    assert int((found.values > 1.02 * noise_edge(noise_deviation(found), shape)).sum()) == 5


def test_a_product_of_thin_factors_has_no_noise_beyond_them() -> None:
    assert noise_deviation(product_svd(numbers(50, 4, seed=1), numbers(4, 40, seed=2))) == 0.0


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.5, 0.1, 0.001])
def test_half_of_marchenko_and_pasturs_distribution_lies_below_its_median(ratio: float) -> None:
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max(0.0, (high - x) * (x - low))) / (2 * math.pi * ratio * x)

    below, _ = scipy.integrate.quad(density, low, noise._median(ratio), limit=200)
    assert below == pytest.approx(0.5, abs=1e-4)


def test_the_median_is_the_one_that_the_papers_threshold_rests_on() -> None:
    # For square matrices 4/√3 over the root of the median is 2.858 (arXiv:1305.5870, abstract).
    assert 4 / math.sqrt(3) / math.sqrt(noise._median(1.0)) == pytest.approx(2.858, abs=5e-4)
