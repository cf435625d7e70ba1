"""Where blocks of a weight lie while changes are added to them: in a scratch, or on an accelerator.

Every thread has a desk of its own. On CUDA each desk has a stream and pinned memory on both sides, so that
the copies of one thread overlap with the arithmetic of another.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Numbers of a block: 4 MiB of float32, near enough to a core to stay there while it is worked on.
_BLOCK = 1 << 20
# On an accelerator a block is worth its copies only if it is large.
_LARGE_BLOCK = 1 << 24


class Desk:
    """A scratch in main memory that is used again and again.

    Fresh memory for every float32 copy of a weight would cost more than the arithmetic. Blocks have fixed
    sizes, so that threads do not show in the last digits.
    """

    numbers = _BLOCK

    def __init__(self) -> None:
        self._space = torch.empty(0)

    def work(self) -> AbstractContextManager[object]:
        """What all that is done at the desk is done in."""
        return nullcontext()

    def lay(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The block where it is worked on, and its numbers in float32 (float64 if it is)."""
        if block.dtype == torch.float64:
            return block, block.clone()
        if self._space.numel() < block.numel():
            self._space = torch.empty(max(self.numbers, block.numel()))
        return block, self._space[: block.numel()].view(block.shape).copy_(block)

    def put(self, rounded: Tensor, target: Tensor) -> None:
        """The result in its place."""
        target.copy_(rounded)


class DeviceDesk(Desk):
    """A part of an accelerator's memory."""

    numbers = _LARGE_BLOCK

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._stream = _stream(device) if device.type == "cuda" else None
        self._staged: dict[str, Tensor] = {}

    def work(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        return torch.cuda.stream(self._stream)

    def lay(self, block: Tensor) -> tuple[Tensor, Tensor]:
        staged = self._stage("in", block).copy_(block)
        here = staged.to(self._device, non_blocking=True)
        return here, here.clone() if here.dtype == torch.float64 else here.float().clone()

    def put(self, rounded: Tensor, target: Tensor) -> None:
        staged = self._stage("out", rounded)
        staged.copy_(rounded, non_blocking=True)
        if self._stream is not None:
            # Also what was staged to go in has gone by now, so that its memory may be used again.
            self._stream.synchronize()
        target.copy_(staged)

    def _stage(self, way: str, like: Tensor) -> Tensor:
        """Memory of this shape that the accelerator can copy from or to by itself."""
        size = like.numel() * like.element_size()
        space = self._staged.get(way)
        if space is None or space.numel() < size:
            pinned = self._stream is not None
            space = self._staged[way] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return space[:size].view(like.dtype).view(like.shape)


def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


_local = threading.local()


def desk(device: torch.device) -> Desk:
    """The calling thread's desk on a device."""
    desks: dict[torch.device, Desk] = _local.__dict__.setdefault("desks", {})
    if device not in desks:
        desks[device] = Desk() if device.type == "cpu" else DeviceDesk(device)
    return desks[device]
