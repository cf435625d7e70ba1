"""Norms and inner products of factored matrices, without forming the product.

A product is a pair (up, down) of shapes (o, r) and (r, i), in any dtype; all sums are in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_norm(up: Tensor, down: Tensor) -> float:
    """Frobenius norm of up @ down, from the triangular factors of both.

    Costs O((o + i) r²). QR rather than Gram matrices: a Gram matrix squares the condition number,
    and a difference of two nearly equal products would drown at 1e-8 of their size.
    """
    core = _triangle(up) @ _triangle(down.T).T
    return float(torch.linalg.vector_norm(core))


def product_inner(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> float:
    """Frobenius inner product of up @ down with other_up @ other_down."""
    rows = up.double().T @ other_up.double()
    columns = down.double() @ other_down.double().T
    return float((rows * columns).sum())


def _triangle(matrix: Tensor) -> Tensor:
    triangle: Tensor = torch.linalg.qr(matrix.double(), mode="r").R
    return triangle
