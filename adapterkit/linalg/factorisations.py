"""Factorisations of small dense matrices, and what to do when one of them does not converge."""

from __future__ import annotations

import math

import scipy.linalg
import torch
from torch import Tensor

from adapterkit.errors import AdapterkitError, Refused

# Documented as torch's, which does not say so to the checker of types.
NotConverged: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the tensor's device (Apple's) has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, in float32 where it has no float64."""
    return (tensor.float() if device.type == "mps" else tensor).to(device)


def inverses(numbers: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0: what does not exist does not count."""
    return torch.where(numbers > 0, 1.0 / numbers, 0.0)


def require_finite(energy: float) -> None:
    """Raise Refused unless this sum of squares is finite: then so is every number in it."""
    if not math.isfinite(energy):
        raise Refused(
            "its numbers are not finite, or too large to be squared",
            code="nonfinite",
            hint="the adapter is damaged; --allow nonfinite goes on without such modules",
        )


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(values (n,) descending, vectors (n, n) in columns) of a symmetric matrix.

    Raises NotConverged where it does not converge.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1), vectors.flip(-1)


def cholesky(matrix: Tensor) -> Tensor | None:
    """The lower triangle L with L Lᵀ = matrix, None where that is not positive definite in float64."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    return None if bool(failed) or not bool(lower.diagonal().isfinite().all()) else lower


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u (o, k), values (k,), vt (k, n)), k = min(o, n): divide and conquer first, the slower and surer
    QR iteration (LAPACK's gesvd) where that fails.

    Raises AdapterkitError with code "no-convergence" where both do.
    """
    try:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    except NotConverged:
        u, values, vt = _surely(matrix)
    return u, values, vt


def _surely(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        found = scipy.linalg.svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    except (scipy.linalg.LinAlgError, ValueError) as error:
        raise AdapterkitError(
            f"no singular value decomposition of a matrix of {'x'.join(map(str, matrix.shape))} converged",
            code="no-convergence",
            hint="the numbers are far apart beyond measure: look at the module, or leave it out",
        ) from error
    u, values, vt = (torch.from_numpy(part).to(matrix.device) for part in found)
    return u, values, vt
