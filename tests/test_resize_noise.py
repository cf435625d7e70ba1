"""What `--rank auto` takes for noise in a LoRA and in a whole delta, against what rounding really did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapterkit.decompose import decompose
from adapterkit.deltas import Change, LowRank, Whole
from adapterkit.resizing import noise_of


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(change: Change) -> float:
    return noise_of(change, decompose({0: change})[0])


@pytest.mark.parametrize("scale", [1.0, -0.25])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_of_a_whole_delta_is_noise_at_its_scale(dtype: torch.dtype, scale: float) -> None:
    # Numbers of one size everywhere, so that rounding is as large everywhere.
    exact = numbers(120, 90, seed=1)
    rounded = Whole(exact.to(dtype), scale=scale)
    difference = scale * (rounded.value.double() - exact)
    largest = float(torch.linalg.matrix_norm(difference, 2))
    assert 0.8 * largest < noise(rounded) < 1.5 * largest


@pytest.mark.parametrize("rank", [4, 12])
@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_the_rounding_of_factors_is_noise_as_large_as_in_their_product(rank: int, scale: float) -> None:
    # Fewer ranks than a tail could be told from: rounding is all the noise there is.
    up, down = numbers(300, rank, seed=1), numbers(rank, 200, seed=2)
    rounded = LowRank(up.to(torch.bfloat16), down.to(torch.bfloat16), scale)
    difference = scale * (rounded.up.double() @ rounded.down.double() - up @ down)
    largest = float(torch.linalg.matrix_norm(difference, 2))
    assert 0.8 * largest < noise(rounded) < 2.0 * largest
