"""Methods that look at singular values and vectors, computed on the factors: no delta is formed.

With B = [up_1 … up_T] and A = [down_1; …; down_T] of R ranks together every delta is Q_B · M · Q_A,
M of R × R, for orthonormal bases Q of B's columns and A's rows. Whatever does not depend on the
choice of orthonormal bases can be done to M.

TSV: Gargiulo et al. 2025, arXiv:2412.00081.  Iso-C: Marczak et al. 2025, arXiv:2502.04959.
KnOTS: Stoica et al. 2025, arXiv:2410.19735.  Core Space: Panariello et al. 2025, arXiv:2509.17786.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkit.linalg.decomposition import Decomposition, fix_signs
from adapterkit.merging.elementwise import combined
from adapterkit.merging.settings import Settings
from adapterkit.merging.tasks import Task

# Singular values below this, beside the largest, are what rounding leaves of zeros: methods that
# make all directions equal would blow them up.
_NOTHING = 1e-7

_Svd = tuple[Tensor, Tensor, Tensor]


def tsv(tasks: Sequence[Task], settings: Settings, key: str, most: int | None = None) -> Decomposition:
    """TSV-Merge: the singular vectors of all tasks, made orthogonal to each other, with their values.

    Σ over tasks of U_t Σ_t V_tᵀ with [U_1 … U_T] and [V_1 … V_T] replaced by the nearest orthonormal
    ones. Of each task the first min(o, n) / T directions count, as in the paper; LoRA has fewer. Vectors
    that are linear combinations of others share their directions with them.
    """
    found = [_weighted_svd(task) for task in tasks]
    limit = max(1, min(tasks[0].up.shape[0], tasks[0].down.shape[1]) // len(tasks))
    left = nearest_orthonormal(torch.cat([u[:, :limit] for u, _, _ in found], dim=1))
    right = nearest_orthonormal(torch.cat([vt[:limit].T for _, _, vt in found], dim=1))
    values = torch.cat([s[:limit] for _, s, _ in found])
    return _decomposition(*product(left * values, right.T), most)


def knots(tasks: Sequence[Task], settings: Settings, key: str, most: int | None = None) -> Decomposition:
    """KnOTS: the deltas beside each other as U Σ [V_1 … V_T]ᵀ, and an elementwise method on the Σ V_tᵀ.

    The basis U is that of the deltas at strength 1; strengths multiply the Σ V_tᵀ.
    """
    factors = [task.factors() for task in tasks]
    basis, triangle = torch.linalg.qr(torch.cat([up for up, _ in factors], dim=1))
    lefts = torch.split(triangle, [task.rank for task in tasks], dim=1)
    right = [torch.linalg.qr(down.T) for _, down in factors]
    beside = [left @ r.T for left, (_, r) in zip(lefts, right, strict=True)]
    u, s, vt = _nonzero(*torch.linalg.svd(torch.cat(beside, dim=1), full_matrices=False))
    parts = torch.split(s[:, None] * vt, [r.shape[0] for _, r in right], dim=1)
    rows = [part @ q.T for part, (q, _) in zip(parts, right, strict=True)]
    merged = _combined(rows, tasks, settings, key)
    return _decomposition(*product(basis @ u, merged), most)


def core(tasks: Sequence[Task], settings: Settings, key: str, most: int | None = None) -> Decomposition:
    """Core Space: an elementwise method on the deltas' coordinates in bases that all of them share.

    The bases are the singular vectors of the stacked factors. Those depend on how an adapter divides
    its delta between up and down, and with them the result; so each delta is divided evenly first:
    up = U √Σ, down = √Σ Vᵀ.
    """
    found = [product(*task.factors()) for task in tasks]
    ups = [u * s.sqrt() for u, s, _ in found]
    downs = [s.sqrt()[:, None] * vt for _, s, vt in found]
    left, right = _basis(torch.cat(ups, dim=1)), _basis(torch.cat(downs).T)
    cores = [(left.T @ up) @ (down @ right) for up, down in zip(ups, downs, strict=True)]
    u, s, vt = torch.linalg.svd(_combined(cores, tasks, settings, key), full_matrices=False)
    return _decomposition(left @ u, s, vt @ right.T, most)


def isotropic(total: Decomposition) -> Decomposition:
    """Iso-C of a weighted sum: all its singular values become their mean.

    The mean is over those that are not zero: those of a LoRA's delta beyond its rank belong to no
    direction, and counting them would only make the result weaker.
    """
    values = total.values
    count = int((values > _NOTHING * values[0]).sum()) if values.numel() else 0
    mean = float(values[:count].mean()) if count else 0.0
    return Decomposition(
        torch.full((count,), mean, dtype=torch.float64), count * mean**2, total.shape, total.vectors
    )


def scaled(found: Decomposition, strength: float) -> Decomposition:
    """The decomposition of `strength` (above 0) times the matrix."""
    if strength == 1.0:
        return found
    return Decomposition(found.values * strength, found.energy * strength**2, found.shape, found.vectors)


def product(up: Tensor, down: Tensor) -> _Svd:
    """(u (o, k), s (k), vt (k, n)) of up @ down in float64, without values that are zero to rounding."""
    left, r_left = torch.linalg.qr(up)
    right, r_right = torch.linalg.qr(down.T)
    u, s, vt = _nonzero(*torch.linalg.svd(r_left @ r_right.T, full_matrices=False))
    return left @ u, s, vt @ right.T


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """The nearest (o, k) with orthonormal columns: U Vᵀ of its singular value decomposition.

    Where columns depend on each other that is not unique; the part that is, U Vᵀ of the values that
    are not zero, is returned.
    """
    basis, triangle = torch.linalg.qr(matrix)
    u, _, vt = _nonzero(*torch.linalg.svd(triangle, full_matrices=False))
    nearest: Tensor = basis @ (u @ vt)
    return nearest


def _weighted_svd(task: Task) -> _Svd:
    """Of the delta at its strength: a negative one turns the left vectors round."""
    up, down = task.factors()
    return product(up * task.strength, down)


def _combined(values: Sequence[Tensor], tasks: Sequence[Task], settings: Settings, key: str) -> Tensor:
    strengths, names = [task.strength for task in tasks], [task.name for task in tasks]
    return combined(values, strengths, names, key, settings.inner, settings)


def _basis(matrix: Tensor) -> Tensor:
    """The left singular vectors that belong to values which are not zero."""
    basis, triangle = torch.linalg.qr(matrix)
    u, _, _ = _nonzero(*torch.linalg.svd(triangle, full_matrices=False))
    vectors: Tensor = basis @ u
    return vectors


def _nonzero(u: Tensor, s: Tensor, vt: Tensor) -> _Svd:
    count = int((s > _NOTHING * s[0]).sum()) if s.numel() else 0
    return u[:, :count], s[:count], vt[:count]


def _decomposition(u: Tensor, s: Tensor, vt: Tensor, most: int | None) -> Decomposition:
    """Of a matrix whose singular vectors are all known; of the vectors `most` are held, in float32."""
    energy = float(s.square().sum())
    kept = s.numel() if most is None else min(most, s.numel())
    left, right = (part.float() for part in fix_signs(u[:, :kept], vt[:kept]))
    shape = (u.shape[0], vt.shape[1])
    return Decomposition(s[:kept].cpu(), energy, shape, lambda rank: (left[:, :rank], right[:rank]))
