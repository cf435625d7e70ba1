"""A product's singular values and vectors from its factors are those of the product itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from adapterkit.errors import AdapterkitError, Refused
from adapterkit.linalg import factorisations, pool, product_svd
from adapterkit.linalg.decomposition import Decomposition
from adapterkit.linalg.product_svd import factored_svd, product_svds

LAW = settings(max_examples=60, derandomize=True, deadline=None, database=None)
SIDE = some.integers(1, 20)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]

Pair = tuple[Tensor, Tensor]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graded(o: int, r: int, n: int, least: float, seed: int) -> Pair:
    """Factors of a product whose singular values fall from 1 to `least`."""
    turn_up, turn_down = (
        torch.linalg.qr(numbers(side, r, seed=seed + place)).Q for place, side in ((0, o), (1, n))
    )
    roots = torch.logspace(0, math.log10(least), r, dtype=torch.float64).sqrt()
    return turn_up * roots, roots[:, None] * turn_down.T


def check_decomposition(found: Decomposition, up: Tensor, down: Tensor) -> None:
    """Values, errors of every truncation, lengths and angles of the vectors, against NumPy's SVD.

    A value keeps five digits at the least, whatever its size. Other errors are measured beside
    ‖up‖ · ‖down‖: of a product that cancels nothing else is known.
    """
    matrix = (up.double() @ down.double()).numpy()
    size = max(float(up.double().norm() * down.double().norm()), 1e-300)
    expected = np.linalg.svd(matrix, compute_uv=False)
    values, k = found.values.numpy(), found.rank
    assert found.shape == matrix.shape
    assert found.values.dtype == torch.float64
    assert np.all(np.diff(values) <= 0) and np.all(values >= 0)
    np.testing.assert_allclose(values, expected[:k], rtol=1e-5, atol=1e-14 * size)
    np.testing.assert_allclose(found.energy, (matrix**2).sum(), rtol=1e-12, atol=(1e-14 * size) ** 2)
    u, vt = (vectors.numpy() for vectors in found.vectors(k))
    for rank in range(k + 1):
        made = (u[:, :rank] * values[:rank]) @ vt[:rank]
        best = math.sqrt((expected[rank:] ** 2).sum())
        assert abs(np.linalg.norm(matrix - made) - best) <= 1e-10 * size
        assert abs(math.sqrt(found.left_out(rank)) - best) <= 1e-7 * size
        up_made, down_made = found.factors(rank, -0.5)
        np.testing.assert_allclose((up_made @ down_made).numpy() * -0.5, made, rtol=0, atol=1e-14 * size)
    check_orthonormal(u.T @ u, values)
    check_orthonormal(vt @ vt.T, values)
    largest = np.abs(u).argmax(axis=0)
    assert np.all(u[largest, np.arange(k)] >= 0)


def check_orthonormal(angles: np.ndarray, values: np.ndarray) -> None:
    """Lengths of 1, angles of 0, each as well as its share in the matrix deserves; zero for zero values."""
    scale = values / values[0] if values.size and values[0] > 0 else values
    expected = np.diag((values > 0).astype(float))
    np.testing.assert_allclose(angles * np.outer(scale, scale), expected * np.outer(scale, scale), atol=1e-10)
    assert np.all(angles[values == 0] == 0)


@given(SIDE, SIDE, SIDE, some.sampled_from(DTYPES), some.sampled_from(DTYPES), some.integers(0, 99))
@LAW
def test_a_product_is_decomposed_as_the_dense_matrix_is(
    o: int, r: int, n: int, up_dtype: torch.dtype, down_dtype: torch.dtype, seed: int
) -> None:
    up, down = numbers(o, r, seed=seed).to(up_dtype), numbers(r, n, seed=seed + 100).to(down_dtype)
    check_decomposition(product_svd.product_svd(up, down), up, down)


@given(SIDE, SIDE, some.integers(1, 6), some.floats(-12, 0), some.booleans(), some.integers(0, 99))
@LAW
def test_values_however_small_keep_their_digits(
    o: int, n: int, r: int, digits: float, mixed: bool, seed: int
) -> None:
    r = min(o, n, r)
    up, down = graded(o, r, n, 10**digits, seed)
    if mixed:
        # The same product from factors that hide how its values fall.
        turn = torch.linalg.qr(numbers(r, r, seed=seed)).Q
        up, down = up @ turn, turn.T @ down
    check_decomposition(product_svd.product_svd(up, down), up, down)


@pytest.mark.parametrize("stretch", [1e-30, 1e-4, 1e4, 1e30])
def test_factors_of_very_different_lengths_are_balanced(stretch: float) -> None:
    up, down = numbers(30, 6, seed=1), numbers(6, 20, seed=2)
    powers = torch.logspace(0, math.log10(stretch), 6, dtype=torch.float64)
    found = product_svd.product_svd(up * powers, down / powers[:, None])
    torch.testing.assert_close(found.values, torch.linalg.svdvals(up @ down)[:6], rtol=1e-12, atol=0)


def dependent() -> dict[str, Pair]:
    """Factors of which some have nothing new to say."""
    up, down = numbers(30, 6, seed=1), numbers(6, 20, seed=2)
    other, twice = numbers(30, 6, seed=3), torch.cat([down, down])
    unused, idle = up.clone(), down.clone()
    unused[:, 2:4], idle[5] = 0, 0
    return {
        "twice the same": (torch.cat([up, up], 1), twice),
        "twice nearly the same": (torch.cat([up, up + 1e-9 * other], 1), twice),
        "one down for both": (torch.cat([up, other], 1), twice),
        "unused ranks": (unused, idle),
        "a rank of nearly nothing": (up * torch.tensor([1, 1, 1, 1e-9, 1, 1e-17]), down),
        "one rank": (up[:, :1], down[:1]),
        "more ranks than rows": (numbers(4, 9, seed=4), numbers(9, 20, seed=5)),
        "more ranks than columns": (numbers(30, 9, seed=4), numbers(9, 3, seed=5)),
        "one number": (up[:1, :1], down[:1, :1]),
    }


@pytest.mark.parametrize("how", dependent())
def test_factors_that_depend_on_each_other_are_decomposed_as_well(how: str) -> None:
    up, down = dependent()[how]
    check_decomposition(product_svd.product_svd(up, down), up, down)


@pytest.mark.parametrize("how", ["untrained", "cancelling"])
def test_a_product_that_is_zero_has_no_values_and_no_vectors(how: str) -> None:
    up, down = numbers(30, 6, seed=1), numbers(6, 20, seed=2)
    pair = {"untrained": (up * 0, down), "cancelling": (torch.cat([up, -up], 1), torch.cat([down, down]))}[
        how
    ]
    found = product_svd.product_svd(*pair)
    assert found.energy == 0.0 and found.error(1) == 0.0
    assert not bool(found.values.any())
    assert not any(bool(factor.any()) for factor in found.factors(4))


@pytest.mark.parametrize("most", [0, 1, 4, 6, 50])
def test_only_as_many_values_are_kept_as_are_wanted_and_the_energy_is_all_of_it(most: int) -> None:
    up, down = numbers(30, 6, seed=1), numbers(6, 20, seed=2)
    found = product_svd.product_svd(up, down, most)
    assert found.rank == min(most, 6)
    check_decomposition(found, up, down)


def several() -> list[Pair]:
    """Large enough for multiplications to be divided among threads, well and badly conditioned."""
    sizes = [(256, 32, 200), (96, 160, 130), (256, 32, 200), (300, 8, 40)]
    pairs = [
        (numbers(o, r, seed=place).half(), numbers(r, n, seed=50 + place).half())
        for place, (o, r, n) in enumerate(sizes)
    ]
    return [*pairs, graded(90, 10, 80, 1e-9, 7), dependent()["twice the same"]]


def check_same(a: Decomposition, b: Decomposition) -> None:
    assert a.energy == b.energy and torch.equal(a.values, b.values)
    for left, right in zip(a.vectors(a.rank), b.vectors(b.rank), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("threads", [1, 2])
def test_results_depend_neither_on_the_threads_nor_on_what_else_is_decomposed(threads: int) -> None:
    pairs, before = several(), torch.get_num_threads()
    with pool.one_thread():
        alone = [product_svd.product_svd(*pair) for pair in pairs]
    torch.set_num_threads(threads)
    try:
        forth, back = product_svds(pairs), product_svds(pairs[::-1])[::-1]
        vectors = [found.vectors(found.rank) for found in forth]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, two, three in zip(alone, forth, back, strict=True):
        check_same(one, two)
        check_same(one, three)
    for one, (u, vt) in zip(alone, vectors, strict=True):
        assert all(map(torch.equal, one.vectors(one.rank), (u, vt)))


def test_products_of_one_shape_are_multiplied_together_where_that_pays() -> None:
    pairs = several()
    for pair, found in zip(pairs, product_svd._together(pairs, None), strict=True):
        check_decomposition(found, *pair)


def test_factors_are_made_when_they_are_needed_and_not_kept() -> None:
    up, down = numbers(30, 6, seed=1), numbers(6, 20, seed=2)
    asked = []

    def factors() -> Pair:
        asked.append(1)
        return up, down

    found = factored_svd(factors)
    assert len(asked) == 1
    found.vectors(2)
    assert len(asked) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_numbers_that_are_not_finite_are_refused(value: float, side: int) -> None:
    pair = (numbers(30, 6, seed=1), numbers(6, 20, seed=2))
    pair[side][3, 2] = value
    with pytest.raises(Refused) as caught:
        product_svd.product_svd(*pair)
    assert caught.value.code == "nonfinite" and caught.value.hint


def fails(*_: object, **__: object) -> None:
    raise factorisations.NotConverged("the algorithm failed to converge")


@pytest.mark.parametrize("failing", [["eigh"], ["eigh", "svd"]])
def test_where_a_factorisation_does_not_converge_the_next_is_tried(
    failing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    up, down = numbers(30, 6, seed=1), numbers(6, 20, seed=2)
    for name in failing:
        monkeypatch.setattr(torch.linalg, name, fails)
    check_decomposition(product_svd.product_svd(up, down), up, down)


def test_where_none_converges_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_too(*_: object, **__: object) -> None:
        raise factorisations.scipy.linalg.LinAlgError("SVD did not converge")

    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, fails)
    monkeypatch.setattr(factorisations.scipy.linalg, "svd", fails_too)
    with pytest.raises(AdapterkitError, match="6x6") as caught:
        product_svd.product_svd(numbers(30, 6, seed=1), numbers(6, 20, seed=2))
    assert caught.value.code == "no-convergence" and caught.value.hint


def test_the_first_item_that_fails_is_the_one_that_is_told_of() -> None:
    def doubled(number: int) -> int:
        if number in (3, 5):
            raise ValueError(f"{number} cannot be doubled")
        return 2 * number

    done: list[int] = []
    with pytest.raises(ValueError, match="3 cannot"):
        pool.each(doubled, range(8), done.append)
    assert done == [1, 2, 3]
    assert pool.each(doubled, [4, 1, 7]) == [8, 2, 14]


@pytest.mark.gpu
def test_an_accelerator_gives_the_same_answers() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    pairs = several()
    for pair, found in zip(
        pairs, product_svds([(up.cuda(), down.cuda()) for up, down in pairs]), strict=True
    ):
        u, vt = found.vectors(found.rank)
        assert u.is_cuda and vt.is_cuda and not found.values.is_cuda
        there = Decomposition(
            found.values,
            found.energy,
            found.shape,
            lambda rank, u=u, vt=vt: (u[:, :rank].cpu(), vt[:rank].cpu()),
        )
        check_decomposition(there, *pair)
