"""One number out of raw bytes, for every dtype, without torch: an alpha is not worth an import."""

from __future__ import annotations

import math
import struct

# struct's letters. F8_E5M2 and BF16 are not here: they are the upper halves of F16 and F32.
_STRUCT = {
    "BOOL": "?", "U8": "B", "I8": "b", "I16": "h", "U16": "H", "F16": "e",
    "I32": "i", "U32": "I", "F32": "f", "F64": "d", "I64": "q", "U64": "Q",
}  # fmt: skip

# (mantissa bits, exponent bias) of the formats in which one code alone is not a number
# and no infinity exists: ONNX, "Float stored in 8 bits".
_FNUZ = {"F8_E4M3FNUZ": (3, 8), "F8_E5M2FNUZ": (2, 16)}


def first_number(data: memoryview, dtype: str) -> float | None:
    """The first element of a tensor's bytes; None for complex and sub-byte dtypes."""
    if dtype in _STRUCT:
        return float(struct.unpack_from("<" + _STRUCT[dtype], data)[0])
    match dtype:
        case "BF16":
            return _widened(bytes(2) + bytes(data[:2]), "<f")
        case "F8_E5M2":
            return _widened(bytes(1) + bytes(data[:1]), "<e")
        case "F8_E8M0":
            return math.nan if data[0] == 0xFF else 2.0 ** (data[0] - 127)
        case "F8_E4M3":
            return math.nan if data[0] & 0x7F == 0x7F else _small_float(data[0], 3, 7)
        case "F8_E4M3FNUZ" | "F8_E5M2FNUZ":
            return math.nan if data[0] == 0x80 else _small_float(data[0], *_FNUZ[dtype])
    return None


def _widened(data: bytes, code: str) -> float:
    return float(struct.unpack(code, data)[0])


def _small_float(code: int, mantissa_bits: int, bias: int) -> float:
    """An 8-bit float: sign, exponent, mantissa; exponent 0 means subnormal."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code & 0x7F) >> mantissa_bits
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias)
    return sign * (1 + mantissa) * 2.0 ** (exponent - bias)
