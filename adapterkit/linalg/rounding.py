"""Rounding float32 once to the dtype of a file: to the nearest number, or up or down by chance.

Two things that a plain cast leaves open are settled here.  What is finite stays finite: numbers beyond the
largest of the dtype become the largest, whatever torch and the device would make of them (float8_e4m3fn has
no infinity, and casts to it have given NaN and 448 in turn).  And chance depends on nothing but a seed and
a number's place in its tensor, so that blocks, their order and the device do not matter.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import TYPE_CHECKING, Literal, Union

from adapterkit.errors import UsageError

if TYPE_CHECKING:
    import torch

Rounding = Literal["nearest", "stochastic"]

_WORD = 0xFFFFFFFF
# Bits of a float32's exponent.
_EXPONENT = 0x7F800000
# The numbers that a float32 in [0, 1) can tell apart evenly.
_CHANCES = 24


def seed_of(key: str, seed: int) -> int:
    """The 64 bits from which a tensor's chances come: of its name and the user's seed, and nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "little")


def round_to(
    value: torch.Tensor, dtype: torch.dtype, how: Rounding = "nearest", seed: int = 0, start: int = 0
) -> torch.Tensor:
    """Float32 numbers of any shape in a floating dtype.

    how: "nearest" rounds ties to even; "stochastic" rounds to one of the two neighbours with the chance
    that makes the mean exact. seed: of the tensor, from `seed_of`. start: the place of the first number in
    its tensor, in row-major order, when `value` is a block of it.
    NaN stays NaN, an infinity stays one or becomes NaN in a dtype without.
    Raises UsageError for a dtype that numbers cannot be rounded to.
    """
    import torch

    require_roundable(dtype)
    largest = torch.finfo(dtype).max
    if not value.numel() or dtype == torch.float32:
        return value.to(dtype)
    low, high = value.aminmax()
    if not (low >= -largest and high <= largest):
        return _with_extremes(value, dtype, how, seed, start)
    if how == "stochastic":
        value = _by_chance(value, dtype, seed, start)
    return value.to(dtype)


def require_roundable(dtype: torch.dtype) -> None:
    """UsageError for a dtype without a sign or a mantissa, or wider than what is rounded."""
    import torch

    if not dtype.is_floating_point or torch.finfo(dtype).min >= 0 or dtype.itemsize > 4:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"weights cannot be rounded to `{name}`", code="dtype", hint="use fp32, fp16, bf16 or fp8"
        )


def beyond(value: torch.Tensor, dtype: torch.dtype) -> int:
    """How many finite numbers are too large for the dtype, so that rounding makes them its largest."""
    import torch

    if not value.numel():
        return 0
    largest = torch.finfo(dtype).max
    low, high = value.aminmax()
    if low >= -largest and high <= largest:
        return 0
    # IEEE rounding gives the largest number up to half a step beyond it, which is no loss of its own.
    top = 2.0 ** math.floor(math.log2(largest))
    return int((value.isfinite() & (value.abs() >= largest + top * step_at_one(dtype) / 2)).sum())


@cache
def step_at_one(dtype: torch.dtype) -> float:
    """From 1 to the next number of the dtype: its `eps`, which torch 2.13 misstates for float8_e5m2fnuz."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return float((torch.ones((), dtype=dtype).view(bits) + 1).view(dtype)) - 1


def fp8_scale(largest: float, dtype: torch.dtype) -> float:
    """The scale with which a tensor whose largest magnitude this is just fills an 8-bit dtype."""
    import torch

    return largest / torch.finfo(dtype).max if largest else 1.0


def round_scaled(
    value: torch.Tensor,
    scale: Union[torch.Tensor, float],
    dtype: torch.dtype,
    how: Rounding = "nearest",
    seed: int = 0,
    start: int = 0,
) -> torch.Tensor:
    """Codes q with q · scale ≈ value, for weights kept as 8-bit numbers beside a scale.

    scale: one number, or a float32 tensor that spreads over `value` (one for each row, say).
    """
    return round_to(value / scale, dtype, how, seed, start)


def _with_extremes(
    value: torch.Tensor, dtype: torch.dtype, how: Rounding, seed: int, start: int
) -> torch.Tensor:
    """What is rounded when some numbers are not finite, or too large."""
    import torch

    largest = torch.finfo(dtype).max
    finite = value.isfinite()
    rounded = round_to(value.where(finite, 0).clamp_(-largest, largest), dtype, how, seed, start)
    # Casts of infinity differ between versions of torch where the dtype has none.
    has_infinity = dtype in {torch.float16, torch.bfloat16, torch.float8_e5m2}
    extremes = value if has_infinity else torch.full_like(value, torch.nan)
    return torch.where(finite, rounded.float(), extremes).to(dtype)


def _by_chance(value: torch.Tensor, dtype: torch.dtype, seed: int, start: int) -> torch.Tensor:
    """Finite float32 numbers moved to neighbours in the dtype's grid, as float32.

    Dividing by a step, which is a power of two, is exact, and so are the fraction and the product: only
    chance decides. Chances come in steps of 2^-24, so that the mean of a number whose fraction is finer,
    far below the dtype's smallest, is exact to 2^-24 of a step.
    """
    import torch

    power = (value.view(torch.int32) & _EXPONENT).view(torch.float32)
    step = power.clamp_(min=torch.finfo(dtype).smallest_normal).mul_(step_at_one(dtype))
    scaled = value / step
    floor = scaled.floor()
    up = _chances(value, seed, start) < scaled.sub_(floor)
    return floor.add_(up).mul_(step)


def _chances(like: torch.Tensor, seed: int, start: int) -> torch.Tensor:
    """Numbers evenly spread over [0, 1) in steps of 2^-24, each from the seed and its own place.

    A hash of the place, not a generator's next number: blocks of any size and threads in any order give
    the same. Rounds and multipliers are those of C. Wellons' `lowbias32` (github.com/skeeto/hash-prospector),
    with the seed's halves put in before the first and the second round.
    """
    import torch

    count = like.numel()
    # Places beyond 2^32 use the same words again, 4 billion numbers later.
    place = torch.arange(start, start + count, dtype=torch.int64, device=like.device).to(torch.int32)
    word = place.bitwise_xor_(_signed(seed & _WORD))
    for shift, factor, salt in ((16, 0x7FEB352D, seed >> 32 & _WORD), (15, 0x846CA68B, 0)):
        word = _folded(word, shift).mul_(_signed(factor)).bitwise_xor_(_signed(salt))
    word = _folded(word, 16)
    top = (word >> (32 - _CHANCES)) & ((1 << _CHANCES) - 1)
    return top.to(torch.float32).mul_(2.0**-_CHANCES).reshape(like.shape)


def _folded(word: torch.Tensor, shift: int) -> torch.Tensor:
    """word ^ (word >> shift) with zeros shifted in."""
    return word.bitwise_xor_((word >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _signed(word: int) -> int:
    """32 bits as torch's int32 counts them."""
    return word - (1 << 32) if word >> 31 else word
