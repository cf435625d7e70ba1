"""Methods of merging as their papers define them, on whole matrices in float64, with NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def trim(values: Array, density: float) -> Array:
    kept = int(density * values.size)
    largest = np.argsort(-np.abs(values).ravel())[:kept]
    mask = np.zeros(values.size, bool)
    mask[largest] = True
    return values * mask.reshape(values.shape)


def elect(weighted: Sequence[Array], weights: Sequence[float]) -> Array:
    sign = np.sign(sum(weighted))
    total, share = np.zeros_like(sign), np.zeros_like(sign)
    for index in np.ndindex(sign.shape):
        for values, weight in zip(weighted, weights, strict=True):
            if values[index] != 0 and np.sign(values[index]) == sign[index]:
                total[index] += values[index]
                share[index] += abs(weight)
    return np.divide(total, share, out=np.zeros_like(total), where=share > 0)


def ties(values: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    weighted = [w * trim(v, density) for v, w in zip(values, weights, strict=True)]
    return elect(weighted, weights)


def knots(matrices: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    u, s, vt = np.linalg.svd(np.hstack(matrices), full_matrices=False)
    kept = s > 1e-6 * s[0]
    parts = np.split(s[kept, None] * vt[kept], len(matrices), axis=1)
    return u[:, kept] @ ties(parts, weights, density)


def tsv(matrices: Sequence[Array], weights: Sequence[float]) -> Array:
    lefts, rights, values = [], [], []
    for matrix, weight in zip(matrices, weights, strict=True):
        u, s, vt = np.linalg.svd(weight * matrix, full_matrices=False)
        kept = min(int((s > 1e-6 * s[0]).sum()), min(matrix.shape) // len(matrices))
        lefts.append(u[:, :kept])
        rights.append(vt[:kept])
        values.append(s[:kept])
    p, _, q = np.linalg.svd(np.hstack(lefts), full_matrices=False)
    r, _, t = np.linalg.svd(np.vstack(rights), full_matrices=False)
    return (p @ q) @ np.diag(np.concatenate(values)) @ (r @ t)


def core(matrices: Sequence[Array], weights: Sequence[float], density: float) -> Array:
    ups, downs = [], []
    for matrix in matrices:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        kept = s > 1e-6 * s[0]
        ups.append(u[:, kept] * np.sqrt(s[kept]))
        downs.append(np.sqrt(s[kept])[:, None] * vt[kept])
    left = np.linalg.svd(np.hstack(ups), full_matrices=False)[0]
    right = np.linalg.svd(np.vstack(downs), full_matrices=False)[2]
    cores = [left.T @ up @ down @ right.T for up, down in zip(ups, downs, strict=True)]
    return left @ ties(cores, weights, density) @ right


def iso(matrices: Sequence[Array], weights: Sequence[float]) -> Array:
    total = sum(weight * matrix for weight, matrix in zip(weights, matrices, strict=True))
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    kept = s > 1e-6 * s[0]
    return u[:, kept] @ vt[kept] * s[kept].mean()
