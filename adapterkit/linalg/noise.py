"""What is noise in a difference of stored weights: rounding, and the flat tail of a spectrum."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adapterkit.linalg.decomposition import Decomposition

# Steps of an integral.
_PARTS = 20000
# Numbers that are looked at together.
_BLOCK = 2**22


def rounding_noise(tensor: Tensor) -> float:
    """The root mean square of the error that storing these numbers in their dtype has made.

    A number rounded to a grid of width `ulp` is off by ulp / √12 on the average; the width doubles
    with every power of two, and is the least normal number's for all that is smaller.  0 for integers.
    """
    if not (tensor.dtype.is_floating_point and tensor.numel()):
        return 0.0
    facts = torch.finfo(tensor.dtype)
    least = math.frexp(facts.tiny)[1]
    total = 0.0
    for block in torch.split(tensor.detach().reshape(-1), _BLOCK):
        numbers = block.cpu() if block.dtype == torch.float64 else block.cpu().float()
        exponents = torch.where(numbers == 0, least, torch.frexp(numbers).exponent)
        total += float(torch.exp2(2.0 * exponents.clamp_min(least).double()).sum())
    # frexp's fraction is in [1/2, 1): a number with exponent e lies on a grid of eps · 2^(e - 1).
    return facts.eps / 2 * math.sqrt(total / tensor.numel() / 12)


def noise_edge(sigma: float, shape: tuple[int, int]) -> float:
    """The largest singular value of a matrix (o, n) of independent noise of deviation sigma.

    The edge of Marchenko and Pastur's distribution, sigma · (√o + √n).
    """
    return sigma * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def noise_deviation(decomposition: Decomposition) -> float:
    """The deviation of the noise in a matrix, told from its spectrum.

    Where all singular values are known, by their median (Gavish and Donoho 2014, arXiv:1305.5870);
    where only the leading k are, by the energy beyond them over the (o − k)(n − k) numbers it is left to.
    0 for a matrix of less than full rank that is known to be one, which leaves no noise.
    """
    (o, n), k = decomposition.shape, decomposition.rank
    short, long = sorted((o, n))
    if k < short:
        return math.sqrt(decomposition.left_out(k) / ((o - k) * (n - k)))
    return float(decomposition.values.median()) / math.sqrt(long * _median(short / long))


@functools.lru_cache(maxsize=256)
def _median(ratio: float) -> float:
    """The median of Marchenko and Pastur's distribution for a matrix of `ratio` = short / long sides."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # x = the middle of both ends plus a cosine takes the root's steep ends out of the integral; the
    # middles of its steps keep off zero, by which the density divides.
    ends = np.linspace(math.pi, 0.0, _PARTS + 1)
    middles = (ends[1:] + ends[:-1]) / 2
    mass = np.cumsum(np.sin(middles) ** 2 / _between(low, high, middles))
    return float(np.interp(mass[-1] / 2, mass, _between(low, high, ends[1:])))


def _between(low: float, high: float, angles: NDArray[np.float64]) -> NDArray[np.float64]:
    places: NDArray[np.float64] = (low + high) / 2 + (high - low) / 2 * np.cos(angles)
    return places
