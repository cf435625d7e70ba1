"""Changes as their leading singular values and vectors: what merge, extract and resize begin with."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from adapterkit.deltas import Change, Kronecker, Whole
from adapterkit.deltas.tensors import computing_dtype
from adapterkit.errors import AdapterkitError, Refused, located
from adapterkit.linalg.decomposition import Decomposition
from adapterkit.linalg.dense_svd import dense_svd
from adapterkit.linalg.factorisations import wide
from adapterkit.linalg.kronecker import kronecker_svd
from adapterkit.linalg.pool import each
from adapterkit.linalg.product_svd import factored_svd, product_svds

Key = TypeVar("Key")
Progress = Callable[[str, int, int], None]


# Above this share of the short side, multiplying the factors out and looking for the leading values of
# the dense matrix takes less time than the core of the factors.
_MANY_RANKS = 0.4
# Products that are on an accelerator at once.
_TOGETHER = 256

_Found = Decomposition | None


@dataclass(frozen=True)
class _Manner:
    """How a run decomposes: see `decompose`."""

    most: int | None
    exact: bool
    tolerance: float
    seed: int
    device: torch.device
    leave_out: bool


@dataclass(frozen=True, eq=False)
class _Task:
    change: Change
    name: str


def decompose(
    changes: Mapping[Key, Change],
    *,
    most: int | None = None,
    exact: bool = False,
    tolerance: float = 1e-3,
    seed: int = 0,
    device: torch.device | str | None = None,
    allow: Collection[str] = frozenset(),
    names: Mapping[Key, str] | None = None,
    progress: Progress | None = None,
) -> dict[Key, Decomposition]:
    """The decomposition of each change as a matrix (o, i · k), scale included, in the order given.

    LoKr through its two small matrices, whatever else has an exact low-rank form through its factors,
    whole deltas as the dense matrices they are.  Factors that have to be computed (LoHa, Tucker, …) are
    made again when vectors are asked for, and never held.  Results depend neither on what else is
    decomposed nor on the number of threads.

    most: how many leading values are wanted, all by default.
    exact, tolerance, seed: of dense matrices, see `adapterkit.linalg.dense_svd`.
    device: where to multiply; what does not fit there is done on the CPU, where results always end.
    allow: "nonfinite" leaves modules out that hold NaN or infinity.
    names: what modules are called in messages.

    Raises Refused (code "nonfinite") for such modules, Unrepresentable (code "not-low-rank") for
    changes that are no matrix or need the base, AdapterkitError (code "no-convergence") where every way
    fails: each names the module.
    """
    manner = _Manner(most, exact, tolerance, seed, torch.device(device or "cpu"), "nonfinite" in allow)
    # The largest first: no thread is left alone with a large one at the end.
    order = sorted(changes, key=lambda key: -_work(changes[key]))
    tasks = [_Task(changes[key], (names or {}).get(key) or str(key)) for key in order]

    def finished(done: int) -> None:
        if progress is not None:
            progress("decompose", done, len(tasks))

    finished(0)
    found = dict(zip(order, _all(tasks, manner, finished), strict=True))
    return {key: there for key in changes if (there := found[key]) is not None}


def _all(tasks: Sequence[_Task], manner: _Manner, finished: Callable[[int], None]) -> list[_Found]:
    if manner.device.type == "cpu":
        return each(partial(_one, manner=manner), tasks, finished)
    # Apple's devices have no float64, without which factors are not decomposed.
    alike = [task for task in tasks if manner.device.type == "cuda" and _by_factors(task.change, manner)]
    batched = _batched(alike, manner)
    found: list[_Found] = []
    for task in tasks:
        found.append(batched[task] if task in batched else _one(task, manner))
        finished(len(found))
    return found


def _one(task: _Task, manner: _Manner) -> _Found:
    """The decomposition of one change; None where it may be left out."""
    try:
        with located(f"`{task.name}`"):
            return _decomposed(task.change, manner)
    except Refused as error:
        if error.code == "nonfinite" and manner.leave_out:
            return None
        raise


def _decomposed(change: Change, manner: _Manner) -> Decomposition:
    if isinstance(change, Kronecker):
        first, second = change.matrices()
        return kronecker_svd(first * change.scale, second, manner.most)
    if _by_factors(change, manner):
        return factored_svd(partial(_factors, change, torch.device("cpu")), manner.most)
    matrix = change.dense(None, computing_dtype(*change.tensors().values())).flatten(1)
    try:
        return _dense(matrix.to(manner.device), manner)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return _dense(matrix, manner)


def _dense(matrix: Tensor, manner: _Manner) -> Decomposition:
    rank = min(manner.most or max(matrix.shape), *matrix.shape)
    found = dense_svd(matrix, rank, exact=manner.exact, tolerance=manner.tolerance, seed=manner.seed)
    return found if matrix.device.type == "cpu" else _at_home(found)


def _by_factors(change: Change, manner: _Manner) -> bool:
    """Whether a change is decomposed through its factors; where it has none, asking for them says so."""
    if isinstance(change, Kronecker) or _is_matrix(change):
        return False
    rank, shape = change.expanded_rank, change.shape
    if rank is None or manner.exact or manner.most is None:
        return True
    short = min(shape[0], math.prod(shape[1:]))
    return rank <= _MANY_RANKS * short or rank <= 2 * manner.most


def _is_matrix(change: Change) -> bool:
    return isinstance(change, Whole) and not change.replaces and change.value.ndim >= 2


def _factors(change: Change, device: torch.device) -> tuple[Tensor, Tensor]:
    """(up, down) with the scale in up, made from what is stored."""
    small = change.low_rank()
    up, down = (matrix.to(device) for matrix in small.matrices())
    return wide(up) * small.scale, down


def _batched(tasks: Sequence[_Task], manner: _Manner) -> dict[_Task, Decomposition]:
    """Those that could be done together on the device; the others are left to be done one by one."""
    found: dict[_Task, Decomposition] = {}
    for start in range(0, len(tasks), _TOGETHER):
        some = tasks[start : start + _TOGETHER]
        try:
            pairs = [_factors(task.change, manner.device) for task in some]
            found.update(zip(some, map(_at_home, product_svds(pairs, manner.most)), strict=True))
        except AdapterkitError:
            # One of them is at fault; which one is told where each is done by itself.
            continue
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
    return found


def _at_home(found: Decomposition) -> Decomposition:
    """The same with vectors that come back to the CPU."""

    def vectors(rank: int) -> tuple[Tensor, Tensor]:
        u, vt = found.vectors(rank)
        return u.cpu(), vt.cpu()

    return replace(found, vectors=vectors)


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it, Apple's devices a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def _work(change: Change) -> int:
    return math.prod(change.shape)
