"""The tensors of a baked file one after the other: computed ahead by threads while others are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Union

import torch

from adapterkit.baking.arithmetic import Manner, baked_tensor
from adapterkit.baking.plan import Baked, BakePlan
from adapterkit.baking.survival import Survival
from adapterkit.linalg.pool import one_thread
from adapterkit.stores.views import bytes_of

if TYPE_CHECKING:
    from adapterkit.baking.undo import UndoWriter

# Bytes of finished tensors that wait to be written.
_AHEAD = 256 * 1024 * 1024
# Bytes read of the base after which its pages are given back.
_HELD = 256 * 1024 * 1024
_UNDO_BLOCK = 16 * 1024 * 1024
_MOST = 8
_CPU = torch.device("cpu")
# Threads that keep an accelerator busy: one copies in, one computes, one copies out.
_FEEDERS = 3
Waiting = tuple[int, "Future[torch.Tensor]"]
Content = Union[bytes, memoryview, "torch.Tensor"]


@dataclass(frozen=True, eq=False)
class Undoing:
    """Where the bits of one file's tensors are kept. file: its name; plain: a tensor's name in it."""

    writer: UndoWriter
    file: str
    plain: Callable[[str], str]

    def note(self, key: str, old: bytes | memoryview, new: bytes | memoryview) -> None:
        """The bits of a tensor of the base, as they were and as they are written."""
        if len(old) != len(new):
            self.writer.add(self.file, self.plain(key), old, new)
            return
        for start in range(0, len(old), _UNDO_BLOCK):
            stop = start + _UNDO_BLOCK
            self.writer.add(self.file, self.plain(key), old[start:stop], new[start:stop], start)


@dataclass(frozen=True, eq=False)
class Stream:
    """What is needed to make the tensors of one file.

    told: of bytes that are done, as they are.  fallbacks: tensors that the device had no memory for.
    """

    plan: BakePlan
    manner: Manner
    survival: Survival
    undoing: Undoing | None = None
    told: Callable[[int], None] | None = None
    fallbacks: list[str] = field(default_factory=list)

    def contents(self, keys: Sequence[str]) -> Generator[tuple[str, Content], None, None]:
        """Each tensor's key and bytes in this order, the same whatever the number of threads."""
        store, tensors = self.plan.base.store, self.plan.tensors
        changed = deque(key for key in keys if key in tensors)
        waiting: deque[Waiting] = deque()
        held = 0
        with one_thread() as cores, ThreadPoolExecutor(self._threads(cores)) as pool:
            threads = self._threads(cores)
            try:
                for key in keys:
                    self._begin(pool, changed, waiting, threads)
                    info = tensors[key].after if key in tensors else store.tensors[key]
                    yield key, waiting.popleft()[1].result() if key in tensors else store.read(key)
                    if self.told is not None:
                        self.told(info.nbytes)
                    held += info.nbytes
                    if held > _HELD:
                        store.release()
                        held = 0
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _threads(self, cores: int) -> int:
        return max(1, cores) if self.manner.device.type == "cpu" else max(_FEEDERS, cores)

    def _begin(
        self, pool: ThreadPoolExecutor, changed: deque[str], waiting: deque[Waiting], threads: int
    ) -> None:
        """Begin the next tensors, as many as memory allows, one for each thread at least."""
        ahead = sum(size for size, _ in waiting)
        while changed and (len(waiting) <= threads or ahead < _AHEAD) and len(waiting) < _MOST * threads:
            baked = self.plan.tensors[changed.popleft()]
            waiting.append((baked.after.nbytes, pool.submit(self.tensor, baked)))
            ahead += baked.after.nbytes

    def tensor(self, baked: Baked) -> torch.Tensor:
        """One tensor, and the bits that it changes noted."""
        with torch.no_grad():
            made = self._made(baked)
        if self.undoing is not None and baked.key == baked.source:
            self.undoing.note(baked.key, self.plan.base.store.read(baked.source), bytes_of(made))
        return made

    def _made(self, baked: Baked) -> torch.Tensor:
        """On the device that was asked for, or on the processor if its memory does not suffice."""
        arguments = (self.plan.base, baked)
        if self.manner.device.type == "cpu":
            return baked_tensor(*arguments, self.manner, self.survival)
        try:
            return baked_tensor(*arguments, self.manner, self.survival)
        except torch.OutOfMemoryError:
            self.fallbacks.append(baked.key)
            self.survival.forget(baked.key)
            return baked_tensor(*arguments, replace(self.manner, device=_CPU), self.survival)
