"""The singular values and vectors of up @ down, without forming the product.

Two ways lead to the small core. The Gram matrices of both factors, in float64, need one pass over
them and multiplications alone; their eigenvalues are squares, so that values far below 1e-5 of
the largest drown. Where there are such, or the factors nearly cancel, thin QR factors of both are taken
instead, which are exact to rounding and take some four times as long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from adapterkit.linalg.decomposition import Decomposition, fix_signs
from adapterkit.linalg.factorisations import NotConverged, cholesky, eigh, inverses, require_finite, svd, wide
from adapterkit.linalg.pool import each, on_one_thread

Factors = Callable[[], tuple[Tensor, Tensor]]

# A Gram matrix is known to 1e-16 of its norm: an eigenvalue that is 1e-10 of it keeps six digits,
# and a singular value, its root, stands at 1e-5 of the largest.
_TRUSTED = 1e-10
# Singular values below this share of ‖up‖ · ‖down‖ are the rounding of float64.
_NOTHING = 1e-15
# What truncating leaves out must be this much of ‖up‖² ‖down‖² for float32 to do: its rounding, some
# 1e-7 of that, then changes the least error by less than can be seen.
_SEEN = 0.01
# Columns whose Gram matrix is quicker at once than by blocks.
_UNDIVIDED = 64
# Bytes in float64 that are multiplied at once on an accelerator.
_BATCH = 2**29


def product_svd(up: Tensor, down: Tensor, most: int | None = None) -> Decomposition:
    """Of up (o, r) @ down (r, n), scale included, in any floating dtype and on any device.

    most: how many of the leading values are wanted, all of them by default.  Computed in float64;
    vectors are float64 on the device of the factors (on the CPU for Apple's), and those of a singular
    value of zero are zero: there is no telling which they would be.
    Raises Refused (code "nonfinite") where the factors hold NaN or infinity, AdapterkitError (code
    "no-convergence") where nothing converges.
    """
    return factored_svd(lambda: (up, down), most)


def factored_svd(
    factors: Factors, most: int | None = None, known: tuple[Tensor, Tensor] | None = None
) -> Decomposition:
    """`product_svd` of factors that are made when they are needed, and not kept in between.

    known: their `grams`, where the caller has them already.
    """
    given = factors()
    up, down = _narrow(*given)
    rows, columns = known if known is not None and up is given[0] else grams(up, down)
    return _decomposition(factors, up, down, rows, columns, most)


def truncated_svd(up: Tensor, down: Tensor, most: int, known: tuple[Tensor, Tensor]) -> Decomposition | None:
    """The `most` leading values of up (o, r) @ down (r, n), both in float32, vectors included.

    A third of the time of `factored_svd`, for products that are cut to few of many ranks.  None where
    little is left out, so that the rounding of float32 could be seen beside it, or where Gram matrices
    do not tell; `factored_svd` is for these.
    known: `grams` of the factors, which may be in float32 as well.
    Raises Refused (code "nonfinite") where the factors hold NaN or infinity.
    """
    rows, columns = (gram.double() for gram in known)
    require_finite(float((rows.diagonal() + columns.diagonal()).sum()))
    balance = _balance(rows.diagonal(), columns.diagonal())
    left, right, doubt = _balanced_grams(rows, columns, balance)
    lower = cholesky(right)
    if lower is None:
        return None
    squares, turn = (part.double() for part in eigh((lower.T @ left @ lower).float()))
    energy = float((rows * columns).sum())
    beyond = energy - float(squares[:most].sum())
    if most >= squares.numel() or beyond < _SEEN * doubt:
        return None
    values = squares[:most].clamp_min(0.0).sqrt()
    combination = balance[:, None] * (lower @ turn[:, :most]) * inverses(values)
    u = up @ combination.float()
    # uᵀ up, by what is known of upᵀ up.
    vt = (inverses(values[:, None]) * (combination.T @ rows)).float() @ down
    u, vt = fix_signs(u, vt)
    return Decomposition(values, energy, (up.shape[0], down.shape[1]), lambda rank: (u[:, :rank], vt[:rank]))


def product_svds(pairs: Sequence[tuple[Tensor, Tensor]], most: int | None = None) -> list[Decomposition]:
    """`product_svd` of each pair, in order.

    On the CPU one by one in a pool. On an accelerator the tall factors of pairs of the same shape are
    multiplied together, and the small cores are left to the CPU.
    """
    if all(up.device.type == "cpu" for up, _ in pairs):
        return each(lambda pair: product_svd(*pair, most), pairs)
    return _together(pairs, most)


def _together(pairs: Sequence[tuple[Tensor, Tensor]], most: int | None) -> list[Decomposition]:
    found: dict[int, Decomposition] = {}
    for places in _batches(pairs):
        ups, downs = (torch.stack(side) for side in zip(*(_narrow(*pairs[p]) for p in places), strict=True))
        rows, columns = grams(ups, downs)
        cores = list(zip(places, ups, downs, rows.cpu(), columns.cpu(), strict=True))
        made = each(lambda core: _decomposition(lambda: pairs[core[0]], *core[1:], most), cores)
        found.update(zip(places, made, strict=True))
    return [found[place] for place in range(len(pairs))]


def _batches(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[int]]:
    """Places of pairs that are alike, no more at once than memory is meant for."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for place, (up, down) in enumerate(pairs):
        alike[(up.shape, down.shape, up.dtype, down.dtype, up.device)].append(place)
    for places in alike.values():
        up, down = pairs[places[0]]
        size = max(1, _BATCH // (8 * max(1, up.numel() + down.numel())))
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _narrow(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with no more ranks than the matrix has rows or columns."""
    rows, columns = up.shape[0], down.shape[1]
    if up.shape[1] <= min(rows, columns):
        return up, down
    whole = wide(up) @ wide(down)
    eye = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
    return (eye, whole) if rows <= columns else (whole, eye)


def grams(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """upᵀ up and down downᵀ (…, r, r) in float64."""
    return gram(wide(up)), gram(wide(down).mT)


def gram(tall: Tensor) -> Tensor:
    """tallᵀ tall, of which a block beside the diagonal is multiplied once and not twice."""
    width = tall.shape[-1]
    if width <= _UNDIVIDED:
        return tall.mT @ tall
    found, half = tall.new_empty(*tall.shape[:-2], width, width), width // 2
    first, second = tall[..., :half], tall[..., half:]
    found[..., :half, :half], found[..., half:, half:] = gram(first), gram(second)
    found[..., :half, half:] = first.mT @ second
    found[..., half:, :half] = found[..., :half, half:].mT
    return found


def _decomposition(
    factors: Factors, up: Tensor, down: Tensor, rows: Tensor, columns: Tensor, most: int | None
) -> Decomposition:
    """From the factors and their Gram matrices; what is of the size of the rank is done on the CPU."""
    rows, columns = rows.cpu(), columns.cpu()
    # Squares cannot cancel: a number that is not finite shows in the diagonal.
    require_finite(float((rows.diagonal() + columns.diagonal()).sum()))
    wanted = min(rows.shape[0], rows.shape[0] if most is None else most)
    balance = _balance(rows.diagonal(), columns.diagonal())
    try:
        core = _gram_core(rows, columns, balance, wanted)
    except NotConverged:
        core = None
    shape = up.shape[0], down.shape[1]
    if core is None:
        return _exactly(factors, up, down, balance, wanted)
    values, energy, combination = core

    @on_one_thread
    def vectors(rank: int) -> tuple[Tensor, Tensor]:
        up, down = map(wide, _narrow(*factors()))
        u = up @ combination[:, :rank].to(up.device)
        # Projected rather than combined as well: that leaves half as much to keep for each module.
        vt = inverses(values[:rank, None]).to(up.device) * ((up.T @ u).T @ down)
        return fix_signs(u, vt)

    return Decomposition(values, energy, shape, vectors)


def _balance(up_squares: Tensor, down_squares: Tensor) -> Tensor:
    """What each column of up is multiplied by, and row of down divided, so that both are of one length.

    0 for a rank that adds nothing because one side of it is zero.
    """
    live = (up_squares > 0) & (down_squares > 0)
    return torch.where(live, (down_squares / up_squares).sqrt().sqrt(), 0.0).nan_to_num(0.0, 0.0, 0.0)


def _gram_core(
    rows: Tensor, columns: Tensor, balance: Tensor, wanted: int
) -> tuple[Tensor, float, Tensor] | None:
    """(values (k,), energy, combination (r, k)) with u = up @ combination, from rows = upᵀ up and
    columns = down downᵀ; None where they do not tell the smallest values.

    With columns = L Lᵀ, the eigenvalues of Lᵀ rows L are the squares of the singular values: two
    multiplications and one eigenproblem, and no inverse.
    """
    left, right, doubt = _balanced_grams(rows, columns, balance)
    lower = cholesky(right)
    if lower is None:
        return None
    squares, turn = eigh(lower.T @ left @ lower)
    count = int((balance > 0).sum())
    if count and float(squares[count - 1]) <= _TRUSTED * doubt:
        return None
    squares[count:] = 0.0
    values = squares.sqrt()
    combination = balance[:, None] * (lower @ turn[:, :wanted]) * inverses(values[:wanted])
    return values[:wanted].clone(), float(values.square().sum()), combination


def _balanced_grams(rows: Tensor, columns: Tensor, balance: Tensor) -> tuple[Tensor, Tensor, float]:
    """The Gram matrices of balanced factors, and the product of their norms, to which they are known.

    In the diagonal of the second there is 1 for ranks that add nothing.
    """
    inverse = inverses(balance)
    left = rows * balance[:, None] * balance
    right = columns * inverse[:, None] * inverse
    doubt = float(left.norm() * right.norm())
    right.diagonal()[balance == 0] = 1.0
    return left, right, doubt


def _exactly(factors: Factors, up: Tensor, down: Tensor, balance: Tensor, wanted: int) -> Decomposition:
    """By QR of both factors (in float64), to the rounding of their product."""
    inner = _triangles(up, down, balance)
    turn_up, values, turn_down = svd(inner[0] @ inner[1].T)
    values = values.cpu()
    doubt = float(inner[0].norm() * inner[1].norm())
    values = torch.where(values > _NOTHING * max(up.shape[0], down.shape[1]) * doubt, values, 0.0)
    kept_up, kept_down = turn_up[:, :wanted].clone(), turn_down[:wanted].clone()

    @on_one_thread
    def vectors(rank: int) -> tuple[Tensor, Tensor]:
        up, down = _balanced(*_narrow(*factors()), balance)
        rank = min(rank, wanted)
        there = (values[:rank] > 0).to(up)
        u = torch.linalg.qr(up).Q @ kept_up[:, :rank] * there
        vt = there[:, None] * (kept_down[:rank] @ torch.linalg.qr(down.T).Q.T)
        return fix_signs(u, vt)

    shape = up.shape[0], down.shape[1]
    return Decomposition(values[:wanted].clone(), float(values.square().sum()), shape, vectors)


def _triangles(up: Tensor, down: Tensor, balance: Tensor) -> tuple[Tensor, Tensor]:
    up, down = _balanced(up, down, balance)
    return torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.T, mode="r").R


def _balanced(up: Tensor, down: Tensor, balance: Tensor) -> tuple[Tensor, Tensor]:
    up, down = wide(up), wide(down)
    balance = balance.to(up.device)
    return up * balance, down * inverses(balance)[:, None]
