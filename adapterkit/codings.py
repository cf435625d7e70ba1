"""How quantised weights come back: one coding for each way of keeping numbers in a few bits.

Each tells from names, dtypes and shapes whether a weight is kept so, and what shape it has; then it gives
the numbers in float32, rounded nowhere. Where the sources disagree, a kernel that users run is followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.errors import Json, StoreError
from adapterkit.stores import Store, TensorInfo
from adapterkit.stores.guards import strict_json

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

# AutoAWQ's GEMM kernel takes a word's columns in the order 0, 2, 4, 6, 1, 3, 5, 7; so this is where each is.
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
# E2M1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_FLOATS = {"F16", "BF16", "F32"}
_SCALES = _FLOATS | {"F8_E8M0"}
_CODES = {"F8_E4M3", "F8_E5M2", "I8"}
# Blocks of the fp8 models of DeepSeek and their kin, where no configuration says otherwise.
_BLOCK = 128
_UNPACKED_FORMATS = {"float8_e4m3fn", "float8_e5m2"}


@dataclass(frozen=True)
class Parts:
    """The tensors one quantised weight is kept in.

    names: by role. config: what the model's configuration says of its quantisation, if anything.
    """

    store: Store
    names: Mapping[str, str]
    config: Mapping[str, Json]

    def info(self, role: str) -> TensorInfo:
        return self.store.info(self.names[role])

    def tensor(self, role: str) -> Tensor:
        return self.store.tensor(self.names[role])

    def numbers(self, role: str) -> Tensor:
        """The tensor in float32."""
        return self.tensor(role).float()

    def json(self, role: str) -> Mapping[str, Json]:
        """A tensor that holds the bytes of a JSON object; {} if it holds another value."""
        value = strict_json(bytes(self.store.read(self.names[role])), self.store.label)
        return value if isinstance(value, dict) else {}

    def has(self, role: str) -> bool:
        return role in self.names


@dataclass(frozen=True)
class Coding:
    """shape: of the plain weight, or None if the parts are no such weight. weight: the numbers in float32."""

    shape: Callable[[Parts], Shape | None]
    weight: Callable[[Parts], Tensor]


# bitsandbytes, 4 bits


def _blocks_shape(parts: Parts) -> Shape | None:
    match parts.json("state"):
        case {"shape": list(shape), "blocksize": int(block)} if block > 0 and _sizes(shape):
            count = math.prod(size for size in shape if isinstance(size, int))
            fits = parts.info("codes").nbytes == -(-count // 2) and parts.info("values").shape == (16,)
            fits = fits and parts.info("maxima").elements == -(-count // block)
            fits = fits and (parts.info("maxima").dtype == "U8") == parts.has("nested_maxima")
            return tuple(size for size in shape if isinstance(size, int)) if fits else None
    return None


def _blocks_weight(parts: Parts) -> Tensor:
    import torch

    state = parts.json("state")
    shape, block = _blocks_shape(parts), state["blocksize"]
    assert shape is not None
    assert isinstance(block, int)
    count = math.prod(shape)
    # The storage may be declared as any dtype; it is bytes, the first of two codes in the high half.
    data = parts.tensor("codes").contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)
    values = parts.numbers("values")[codes.int()]
    values = torch.nn.functional.pad(values, (0, -values.numel() % block)).reshape(-1, block)
    maxima = _nested_maxima(parts, state) if parts.has("nested_maxima") else parts.numbers("maxima")
    return (values[: maxima.numel()] * maxima.reshape(-1, 1)).reshape(-1)[:count].reshape(shape)


def _nested_maxima(parts: Parts, state: Mapping[str, Json]) -> Tensor:
    """Maxima that are quantised themselves, to 8 bits in larger blocks around an offset."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not isinstance(block, int) or not isinstance(offset, int | float):
        raise StoreError(f"{parts.store.label}: `{parts.names['state']}` has no offset", code="quantized")
    codes = parts.tensor("maxima").reshape(-1).int()
    scales = parts.numbers("nested_maxima").repeat_interleave(block)[: codes.numel()]
    return parts.numbers("nested_values")[codes] * scales + offset


# bitsandbytes, 8 bits


def _int8_shape(parts: Parts) -> Shape | None:
    codes, scale = parts.info("codes"), parts.info("scale")
    fits = codes.dtype == "I8" and len(codes.shape) == 2 and scale.elements == codes.shape[0]
    # Format 0 is row after row; others are tiled for a kernel (bitsandbytes nn/modules.py).
    plain = not parts.has("format") or parts.store.scalar(parts.names["format"]) == 0
    return codes.shape if fits and plain else None


def _int8_weight(parts: Parts) -> Tensor:
    return parts.numbers("codes") * (parts.numbers("scale").reshape(-1, 1) / 127)


# GPTQ and AWQ


def _gptq_bits(parts: Parts) -> int:
    outputs = parts.info("scales").shape[1]
    return parts.info("zeros").shape[1] * 32 // outputs if outputs else 0


def _gptq_shape(parts: Parts) -> Shape | None:
    codes, zeros, scales = (parts.info(role) for role in ("codes", "zeros", "scales"))
    if not _are_matrices(codes, zeros, scales) or codes.dtype != "I32" or zeros.dtype != "I32":
        return None
    bits, outputs = _gptq_bits(parts), codes.shape[1]
    if bits not in (2, 3, 4, 8) or scales.shape[1] != outputs or zeros.shape[0] != scales.shape[0]:
        return None
    inputs = codes.shape[0] * 32 // bits
    if parts.has("groups") and parts.info("groups").shape != (inputs,):
        return None
    return (outputs, inputs) if parts.has("groups") or inputs % scales.shape[0] == 0 else None


def _gptq_weight(parts: Parts) -> Tensor:
    import torch

    shape, bits = _gptq_shape(parts), _gptq_bits(parts)
    assert shape is not None
    outputs, inputs = shape
    scales = parts.numbers("scales").T
    codes = _unpacked(parts.tensor("codes").T, bits, inputs)
    zeros = _unpacked(parts.tensor("zeros"), bits, outputs)
    if _keeps_zeros_less_one(parts, zeros, bits):
        zeros = (zeros + 1) & (2**bits - 1)
    groups = torch.arange(inputs) // (inputs // scales.shape[1])
    if parts.has("groups"):
        groups = parts.tensor("groups").long()
    return (codes.float() - zeros.float().T[:, groups]) * scales[:, groups]


def _keeps_zeros_less_one(parts: Parts, zeros: Tensor, bits: int) -> bool:
    """AutoGPTQ wrote zeros less one, and GPTQModel's second version does not: the configuration says which.

    Without one, symmetric zeros speak for themselves: they are all in the middle.
    """
    if parts.config:
        return parts.config.get("checkpoint_format", "gptq") != "gptq_v2"
    middle = 2 ** (bits - 1)
    if bool((zeros == middle).all()):
        return False
    if bool((zeros == middle - 1).all()):
        return True
    raise StoreError(
        f"{parts.store.label}: `{parts.names['zeros']}` may be of the first or second version of GPTQ",
        code="quantized",
        hint="open the folder with its config.json, which says which",
    )


def _awq_shape(parts: Parts) -> Shape | None:
    codes, zeros, scales = (parts.info(role) for role in ("codes", "zeros", "scales"))
    if not _are_matrices(codes, zeros, scales) or codes.dtype != "I32" or zeros.dtype != "I32":
        return None
    inputs, outputs, groups = codes.shape[0], codes.shape[1] * 8, scales.shape[0]
    fits = scales.shape == (groups, outputs) and zeros.shape == (groups, codes.shape[1])
    return (outputs, inputs) if fits and groups and inputs % groups == 0 else None


def _awq_weight(parts: Parts) -> Tensor:
    scales = parts.numbers("scales")
    codes, zeros = (_awq_columns(parts.tensor(role)) for role in ("codes", "zeros"))
    times = codes.shape[0] // scales.shape[0]
    return ((codes - zeros.repeat_interleave(times, 0)) * scales.repeat_interleave(times, 0)).T.contiguous()


def _awq_columns(words: Tensor) -> Tensor:
    codes = _unpacked(words, 4, words.shape[1] * 8).reshape(words.shape[0], -1, 8)
    return codes[:, :, _AWQ_PLACES].reshape(words.shape[0], -1).float()


# compressed-tensors


def _packed_bits(parts: Parts, inputs: int) -> int | None:
    words = parts.info("codes").shape[-1]
    return next((bits for bits in (2, 4, 8) if -(-inputs * bits // 32) == words), None)


def _packed_shape(parts: Parts) -> Shape | None:
    codes, scale, shape = (parts.info(role) for role in ("codes", "scale", "shape"))
    if codes.dtype != "I32" or len(codes.shape) != 2 or shape.elements != 2 or scale.dtype not in _FLOATS:
        return None
    outputs, inputs = (int(size) for size in parts.tensor("shape").reshape(-1).tolist())
    bits = _packed_bits(parts, inputs)
    if bits is None or codes.shape[0] != outputs:
        return None
    if parts.has("zeros") and parts.info("zeros").shape != (-(-outputs * bits // 32), scale.shape[-1]):
        return None
    by_place = parts.has("groups") and parts.info("groups").shape == (inputs,)
    spread = by_place or _blocks_of((outputs, inputs), scale.shape, None) is not None
    return (outputs, inputs) if spread else None


def _packed_weight(parts: Parts) -> Tensor:
    import torch

    shape = _packed_shape(parts)
    assert shape is not None
    bits = _packed_bits(parts, shape[1])
    assert bits is not None
    # Codes are kept as unsigned numbers, around the middle.
    middle = 2 ** (bits - 1)
    codes = _unpacked(parts.tensor("codes"), bits, shape[1]).float() - middle
    scale = parts.numbers("scale")
    zeros = torch.zeros(())
    if parts.has("zeros"):
        zeros = _unpacked(parts.tensor("zeros").T, bits, shape[0]).T.float() - middle
    if parts.has("groups") and (groups := parts.tensor("groups").long()).min() >= 0:
        scale = scale[:, groups]
        zeros = zeros[:, groups] if zeros.dim() else zeros
    around: Tensor = codes - _spread(zeros, shape, None)
    return around * _spread(scale, shape, None)


# Codes beside a scale


def _scaled_shape(parts: Parts) -> Shape | None:
    codes, scale = parts.info("codes"), parts.info("scale")
    if codes.dtype not in _CODES or scale.dtype not in _SCALES:
        return None
    if parts.has("format") and parts.json("format").get("format") not in _UNPACKED_FORMATS:
        return None
    if parts.has("zeros") and parts.info("zeros").shape != scale.shape:
        return None
    return codes.shape if _blocks_of(codes.shape, scale.shape, _block_of(parts)) is not None else None


def _scaled_weight(parts: Parts) -> Tensor:
    codes, block = parts.numbers("codes"), _block_of(parts)
    if parts.has("zeros"):
        codes = codes - _spread(parts.numbers("zeros"), codes.shape, block)
    return codes * _spread(parts.numbers("scale"), codes.shape, block)


def _block_of(parts: Parts) -> tuple[int, int] | None:
    match parts.config.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return (rows, columns)
    return None


def _blocks_of(shape: Shape, scale: Shape, block: tuple[int, int] | None) -> Shape | None:
    """How many numbers share a scale along each axis; None if the two do not fit together."""
    if math.prod(scale) == 1:
        return shape
    if len(scale) == 1 and len(shape) > 1:
        scale = (*scale, *(1 for _ in shape[1:]))
    if len(scale) != len(shape):
        return None
    wanted = (*(None for _ in shape[2:]), *(block or (None, None)))[-len(shape) :]
    found = [_along(size, count, one) for size, count, one in zip(shape, scale, wanted, strict=True)]
    return None if None in found else tuple(each for each in found if each is not None)


def _along(size: int, count: int, block: int | None) -> int | None:
    if count in (1, size):
        return size // max(1, count)
    if block is not None:
        return block if -(-size // block) == count else None
    if -(-size // _BLOCK) == count:
        return _BLOCK
    return size // count if count and size % count == 0 else None


def _spread(scale: Tensor, shape: Shape, block: tuple[int, int] | None) -> Tensor:
    """A scale for every number, or one that torch spreads itself."""
    if scale.numel() == 1:
        return scale.reshape(())
    blocks = _blocks_of(shape, tuple(scale.shape), block)
    assert blocks is not None
    scale = scale.reshape(*scale.shape, *(1 for _ in shape[scale.dim() :]))
    for axis, (size, each) in enumerate(zip(shape, blocks, strict=True)):
        if scale.shape[axis] not in (1, size):
            scale = scale.repeat_interleave(each, axis).narrow(axis, 0, size)
    return scale


# MXFP4


def _mx_shape(parts: Parts) -> Shape | None:
    codes, scales = parts.info("codes"), parts.info("scales")
    fits = codes.dtype == scales.dtype == "U8" and len(codes.shape) >= 3 and codes.shape[-1] == 16
    if not fits or scales.shape != codes.shape[:-1]:
        return None
    *front, rows, groups = scales.shape
    return (*front, groups * 32, rows)


def _mx_weight(parts: Parts) -> Tensor:
    import torch

    data = parts.tensor("codes")
    codes = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)
    values = torch.tensor(_E2M1 + [-value for value in _E2M1])[codes.int()]
    exponents = parts.tensor("scales").int() - 127
    return torch.ldexp(values, exponents.unsqueeze(-1)).flatten(-2).transpose(-1, -2).contiguous()


# Shared


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """(n, w) words of 32 bits as (n, count) codes, the lowest bits first; codes may lie across two words."""
    import torch

    data = words.contiguous().view(torch.uint8)
    unit = bits if 8 % bits == 0 else 1
    codes = torch.stack([(data >> shift) & (2**unit - 1) for shift in range(0, 8, unit)], dim=-1).flatten(1)
    if unit != bits:
        each = codes[:, : count * bits].reshape(len(codes), count, bits)
        codes = (each << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return codes[:, :count]


def _are_matrices(*infos: TensorInfo) -> bool:
    return all(len(info.shape) == 2 and info.elements for info in infos)


def _sizes(shape: list[Json]) -> bool:
    return all(isinstance(size, int) and size >= 0 for size in shape)


CODINGS: Mapping[str, Coding] = {
    "four-bit-blocks": Coding(_blocks_shape, _blocks_weight),
    "rows-of-int8": Coding(_int8_shape, _int8_weight),
    "gptq": Coding(_gptq_shape, _gptq_weight),
    "awq": Coding(_awq_shape, _awq_weight),
    "packed": Coding(_packed_shape, _packed_weight),
    "scaled": Coding(_scaled_shape, _scaled_weight),
    "mx-four-bit": Coding(_mx_shape, _mx_weight),
}
