"""The row-id oracle: ask a real converter where every row of its output comes from.

A fake native checkpoint is made in which every row carries a number of its own. The converter
renames, splits, swaps and stacks it as it would a real one; the numbers read back from its output
say, row by row, which native tensor and row stands there. `rows_of` says the same from our tables.
Both being equal proves names, cuts, stacks and order at once, with true heights and no weights.

Tensors are one column wide. A row of a transposed tensor is written ("name.T", k): the k-th
column of the canonical tensor is the k-th row of `name`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from adapterkit.specs.names import Network, Piece, Row

Source = tuple[str, int]
RowMap = dict[str, list[Source]]
Checkpoint = dict[str, torch.Tensor]

INVENTED: Source = ("", 0)  # a row that comes from no native tensor (a converter's zeros)


def row_map(
    convert: Callable[[Checkpoint], Mapping[str, torch.Tensor]],
    shapes_native: Mapping[str, tuple[int, ...]],
) -> RowMap:
    """Canonical tensor -> where each of its rows comes from, according to `convert`."""
    names, starts, checkpoint, following = [], [], {}, 1
    for name, shape in shapes_native.items():
        height = shape[0] if shape else 1
        names.append(name)
        starts.append(following)
        ids = torch.arange(following, following + height, dtype=torch.int64)
        checkpoint[name] = ids.reshape(height, *(1 for _ in shape[1:])) if shape else ids[0]
        following += height

    def source(number: int, suffix: str) -> Source:
        if number == 0:
            return INVENTED
        index = bisect_right(starts, number) - 1
        return names[index] + suffix, number - starts[index]

    result: RowMap = {}
    for name, tensor in convert(checkpoint).items():
        suffix = ".T" if tensor.dim() == 2 and tensor.shape[1] > 1 else ""
        result[name] = [source(number, suffix) for number in tensor.to(torch.int64).flatten().tolist()]
    return result


def rows_of(network: Network, naming: str) -> RowMap:
    """Canonical tensor -> where each of its rows comes from, according to our tables."""
    result: RowMap = {}
    for row in network.namings[naming].rows:
        for native, param in native_tensors(network, row):
            offset = 0
            for piece in row.span:
                name = _tensor(piece, param)
                shape = network.shapes[name]
                if piece.transposed:
                    result[name] = [(native + ".T", k) for k in range(shape[1])]
                    continue
                first, last = int(piece.start * shape[0]), int(piece.stop * shape[0])
                rows = result.setdefault(name, [INVENTED] * shape[0])
                rows[first:last] = [(native, offset + k) for k in range(last - first)]
                offset += last - first
    return result


def shapes_of(network: Network, naming: str) -> dict[str, tuple[int, ...]]:
    """The shape of every native tensor of a naming, as its canonical pieces make it."""
    result: dict[str, tuple[int, ...]] = {}
    for row in network.namings[naming].rows:
        for native, param in native_tensors(network, row):
            shapes = [network.shapes[_tensor(piece, param)] for piece in row.span]
            if row.span[0].transposed:
                result[native] = tuple(reversed(shapes[0]))
                continue
            heights = (shape[0] * (p.stop - p.start) for shape, p in zip(shapes, row.span, strict=True))
            result[native] = (int(sum(heights)), *shapes[0][1:])
    return result


def native_tensors(network: Network, row: Row) -> Iterator[tuple[str, str]]:
    """(native tensor, param) of each tensor a row stands for: a module's weight, then its bias if any."""
    if row.param is not None:
        yield row.native, row.param
        return
    for param in ("weight", "bias"):
        if _tensor(row.span[0], param) in network.shapes:
            yield f"{row.native}.{param}", param


def _tensor(piece: Piece, param: str) -> str:
    return f"{piece.module}.{param}" if param else piece.module
