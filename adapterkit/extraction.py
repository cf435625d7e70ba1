"""The difference of two checkpoints, one tensor at a time, taken apart as far as ranks may be wanted.

Neither checkpoint is ever in memory as a whole: a worker reads both sides of one tensor, subtracts
them in float32, keeps the leading singular values and vectors, and lets go of the rest.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.deltas import Change
from adapterkit.errors import AdapterkitError, Json, Refused
from adapterkit.linalg.decomposition import Decomposition
from adapterkit.linalg.dense_svd import dense_svd, energy_of
from adapterkit.linalg.noise import noise_deviation, noise_edge, rounding_noise
from adapterkit.linalg.pool import each
from adapterkit.pairing import Line, Pairing
from adapterkit.ranks import RankRule

# Ranks beyond this are not worth an adapter, and decompositions cost by the rank that is known.
HIGHEST = 128
# Rows are compared in blocks of about so many numbers, so that large embeddings take little memory.
_BLOCK = 1 << 22
# So many numbers stay in a core's cache while they are converted and subtracted: twice as fast.
_CACHED = 1 << 16
# So many numbers of a weight show how coarsely it was rounded.
_SAMPLE = 1 << 18
# After so many bytes the pages of both files are given back to the system.
_HELD = 64 << 20
# Float32 differences of all workers together; a tensor that is larger waits until it is alone.
_IN_FLIGHT = 240 << 20
# Values this small beside the largest are what float32 arithmetic leaves of zeros.
_NOTHING = 2.0**-22

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to take differences apart.

    rule: which ranks can be wanted.  whole: keep vectors as they are.  embeddings: take them apart, too.
    exact, seed: see `linalg.dense_svd`.  device: where to compute.  dtype: of the factors to be written.
    allow: with "nonfinite" a tensor with NaN or infinity is left out instead of refused.
    """

    rule: RankRule
    whole: bool = False
    embeddings: bool = False
    exact: bool = False
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float16
    allow: Collection[str] = ()

    @property
    def most(self) -> int:
        """The greatest rank that can come out of the rule."""
        return self.rule.highest or HIGHEST

    def takes(self, line: Line) -> str:
        """ "factors", "whole", or why the line is only measured."""
        if line.form in ("linear", "conv") or (line.form in ("embedding", "head") and self.embeddings):
            return "factors"
        if line.form in ("vector", "parameter") and self.whole:
            return "whole"
        return line.form


@dataclass(frozen=True, eq=False)
class Found:
    """What comparing one line gave.

    energy: ‖tuned − base‖², base: ‖base‖², both in float64; infinite where a number is not finite.
    decomposition: for lines that become factors.  noise: values up to this are noise.
    whole: the difference, of lines that are kept as they are.
    """

    line: Line
    energy: float
    base: float
    decomposition: Decomposition | None = None
    noise: float = 0.0
    whole: Tensor | None = None

    @property
    def change(self) -> float:
        """‖tuned − base‖ / ‖base‖."""
        if not self.energy:
            return 0.0
        return math.sqrt(self.energy / self.base) if self.base else math.inf


def compare(pairing: Pairing, settings: Settings, progress: Progress | None = None) -> list[Found]:
    """Compare all lines, in their order.

    The result does not depend on the number of threads. Raises Refused (code "nonfinite") for a tensor
    with NaN or infinity, named, unless it is allowed.
    """
    lines = pairing.lines
    comparing = _Comparing(pairing.tuned, pairing.base, settings)
    # The largest first, so that no thread is left alone with one at the end.
    order = sorted(range(len(lines)), key=lambda index: -lines[index].elements)

    def finished(done: int) -> None:
        if progress is not None:
            progress("compare", done, len(lines))

    found = each(comparing.compare, [lines[index] for index in order], finished)
    by_line = dict(zip(order, found, strict=True))
    return [by_line[index] for index in range(len(lines))]


@dataclass
class _Comparing:
    """Both checkpoints, and how much of them is in memory."""

    tuned: Checkpoint
    base: Checkpoint
    settings: Settings
    touched: int = 0
    flying: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    scratch: threading.local = field(default_factory=threading.local)

    def compare(self, line: Line) -> Found:
        how = self.settings.takes(line)
        size = 4 * line.elements if how == "factors" else 4 * min(line.elements, _BLOCK)
        with self.changed:
            self.changed.wait_for(lambda: not self.flying or self.flying + size <= _IN_FLIGHT)
            self.flying += size
        try:
            return self._compare(line, how)
        except AdapterkitError as error:
            error.at(f"`{line.name}`")
            raise
        finally:
            with self.changed:
                self.flying -= size
                self.changed.notify_all()
            self._release(4 * line.elements)

    def _release(self, size: int) -> None:
        with self.changed:
            self.touched += size
            if self.touched < _HELD:
                return
            self.touched = 0
        self.tuned.store.release()
        self.base.store.release()
        _trim()

    def _compare(self, line: Line, how: str) -> Found:
        place, height = line.place, line.shape[0]
        at = (place.component, place.span, place.param)
        here, there = self.tuned.tensor(*at), self.base.tensor(*at)
        assert here is not None and there is not None
        here, there = here[:height], there[:height].reshape(line.shape)
        self.tuned.store.require_unchanged()
        self.base.store.require_unchanged()
        if _identical(here, there):
            return Found(line, 0.0, 0.0)
        if how == "factors":
            return self._taken_apart(line, here, there)
        energy, base = _energies(here, there)
        self._require_finite(line, energy)
        whole = _subtracted(here, there) if how == "whole" and math.isfinite(energy) else None
        return Found(line, energy, base, whole=whole)

    def _taken_apart(self, line: Line, here: Tensor, there: Tensor) -> Found:
        settings = self.settings
        try:
            delta = _subtracted(here, there, self._memory(here.numel()))
            found = self._decomposed(delta.flatten(1))
        except Refused as error:
            if error.code != "nonfinite":
                raise
            self._require_finite(line, math.inf)
            return Found(line, math.inf, 0.0)
        if not found.energy:
            return Found(line, 0.0, 0.0)
        noise = _noise(here, there, found) if settings.rule.auto else 0.0
        wanted = int((found.values > noise).sum()) if settings.rule.auto else found.rank
        kept = kept_part(found, max(1, min(wanted, settings.most)), settings.dtype)
        if line.tall > line.shape[0]:
            kept = _taller(kept, line.tall)
        return Found(line, found.energy, _squared(there), kept, noise)

    def _memory(self, numbers: int) -> Tensor:
        """Room for so many, the same for all that a thread compares: new memory takes longer than arithmetic.

        The first that a thread gets is its largest, so that the room hardly ever grows.
        """
        held: Tensor | None = getattr(self.scratch, "memory", None)
        if held is None or held.numel() < numbers:
            held = self.scratch.memory = torch.empty(numbers)
        return held

    def _decomposed(self, delta: Tensor) -> Decomposition:
        """On the device; what does not fit there on the processor."""
        settings = self.settings
        try:
            there = delta.to(settings.device)
            return dense_svd(there, settings.most, exact=settings.exact, seed=settings.seed)
        except torch.OutOfMemoryError:
            return dense_svd(delta, settings.most, exact=settings.exact, seed=settings.seed)

    def _require_finite(self, line: Line, energy: float) -> None:
        if math.isfinite(energy) or "nonfinite" in self.settings.allow:
            return
        raise Refused(
            "it holds NaN or infinity, in one checkpoint or in both",
            code="nonfinite",
            hint="the checkpoint is damaged; --allow nonfinite leaves this tensor out",
            details={"module": line.name, "keys": list[Json](line.keys)},
        )


def _noise(here: Tensor, there: Tensor, found: Decomposition) -> float:
    """The largest singular value that noise alone would make.

    Both were rounded when they were saved; the base's rounding is part of the difference wherever the
    tuned weights were not made from these very numbers, which nothing tells. Where nothing was
    rounded to speak of, the tail of the spectrum shows what noise there is.
    """
    sigma = rounding_noise(_sample(here)) ** 2 + rounding_noise(_sample(there)) ** 2
    if min(here.element_size(), there.element_size()) > 2:
        sigma = max(sigma, noise_deviation(found) ** 2)
    # The largest value of noise strays beyond its edge by about this share (Johnstone 2001, Theorem 1.1).
    beyond = 1.0 + math.pow(min(found.shape), -2 / 3)
    return max(beyond * noise_edge(math.sqrt(sigma), found.shape), _NOTHING * float(found.values[0]))


def _sample(weight: Tensor) -> Tensor:
    """Some of its rows, evenly spread."""
    return weight[:: max(1, weight.numel() // _SAMPLE)]


def _trim() -> None:
    """Let the allocator give back what was freed: glibc keeps hundreds of megabytes of it for its threads."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def kept_part(found: Decomposition, rank: int, dtype: torch.dtype) -> Decomposition:
    """The same with `rank` values and vectors at most, held as factors in `dtype`.

    As factors with the square root of the values each they are what will be written, so that rounding
    them here loses nothing.  `energy` is still all of it.
    """
    rank = min(rank, found.rank)
    values = found.values[:rank].clone()
    u, vt = (vectors.cpu() for vectors in found.vectors(rank))
    roots = values.sqrt().to(u)
    held = (u * roots).to(dtype), (vt * roots[:, None]).to(dtype)
    unit = torch.where(roots > 0, 1 / roots, torch.zeros_like(roots))

    def vectors(k: int) -> tuple[Tensor, Tensor]:
        up, down = held
        return up[:, :k].to(unit) * unit[:k], down[:k].to(unit) * unit[:k, None]

    return Decomposition(values, found.energy, found.shape, vectors, held)


def _taller(found: Decomposition, rows: int) -> Decomposition:
    """The decomposition of the matrix with rows of zeros below it."""
    below = rows - found.shape[0]

    def vectors(k: int) -> tuple[Tensor, Tensor]:
        u, vt = found.vectors(k)
        return torch.cat([u, u.new_zeros(below, k)]), vt

    return replace(found, shape=(rows, found.shape[1]), vectors=vectors, held=None)


def _identical(here: Tensor, there: Tensor) -> bool:
    """Whether both are the same bit for bit; NaNs are, too."""
    if here.dtype != there.dtype or here.shape != there.shape:
        return False
    return all(
        torch.equal(_bits(one), _bits(two)) for one, two in zip(_blocks(here), _blocks(there), strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _blocks(tensor: Tensor, numbers: int = _BLOCK) -> Iterator[Tensor]:
    """Its rows, about so many numbers at a time."""
    if tensor.ndim == 0:
        yield tensor.reshape(1)
        return
    rows = max(1, numbers // max(1, math.prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows]


def _subtracted(here: Tensor, there: Tensor, memory: Tensor | None = None) -> Tensor:
    """tuned − base in float32 (float64 where both are); in `memory` if that is given and of that dtype."""
    work = torch.float64 if here.dtype == there.dtype == torch.float64 else torch.float32
    if memory is None or memory.dtype != work:
        memory = torch.empty(here.numel(), dtype=work)
    delta = memory[: here.numel()].view(here.shape)
    for out, one, two in zip(*(_blocks(t, _CACHED) for t in (delta, here, there)), strict=True):
        # Numbers of one byte do not take part in arithmetic.
        out.copy_(one).sub_(two if two.element_size() > 1 else two.to(work))
    return delta


def _energies(here: Tensor, there: Tensor) -> tuple[float, float]:
    """(‖tuned − base‖², ‖base‖²), block by block."""
    pairs = list(zip(_blocks(here), _blocks(there), strict=True))
    return math.fsum(_squared(_subtracted(*pair)) for pair in pairs), math.fsum(
        _squared(there) for _, there in pairs
    )


def _squared(tensor: Tensor) -> float:
    """‖tensor‖² in float64; infinite or NaN where a number is not finite."""
    return energy_of(tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1))


def remaining(pairing: Pairing, line: Line, change: Change) -> float:
    """‖tuned − base − change‖² of one line, computed from the numbers themselves."""
    place = line.place
    here = pairing.tuned.tensor(place.component, place.span, place.param)
    there = pairing.base.tensor(place.component, place.span, place.param)
    assert here is not None and there is not None
    rows = line.shape[0]
    delta = _subtracted(here[:rows], there[:rows].reshape(line.shape))
    return _squared(delta.sub_(change.dense()[:rows].reshape(line.shape)))


def suspicious(found: Sequence[Found], limit: float = 0.5) -> bool:
    """Whether most matrices differ by so much that the base can hardly be the right one."""
    matrices = [one.change for one in found if one.line.form in ("linear", "conv") and one.energy]
    return 2 * sum(change > limit for change in matrices) > len(matrices) > 0
