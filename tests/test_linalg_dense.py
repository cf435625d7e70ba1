"""Dense matrices are cut to a rank as well as can be, and Kronecker products need not become dense."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from adapterkit.errors import Mismatch, Refused
from adapterkit.linalg import dense_svd as module
from adapterkit.linalg import factorisations, pool
from adapterkit.linalg.decomposition import Decomposition
from adapterkit.linalg.dense_svd import dense_svd, energy_of
from adapterkit.linalg.kronecker import kronecker_svd, nearest_kronecker

LAW = settings(max_examples=40, derandomize=True, deadline=None, database=None)
SIDE = some.integers(1, 12)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def spectrum(kind: str, count: int) -> Tensor:
    """Singular values as differences of trained weights have them, and some that are hard to tell apart."""
    place = torch.arange(1, count + 1, dtype=torch.float64)
    return {
        "slow": place**-0.5,
        "quick": 1 / place,
        "steep": 10.0 ** (-place / 4),
        "signal in noise": torch.where(place <= 12, 3.0, 1.0 - place / (2 * count)),
        "flat": 1.0 - place / (10 * count),
        "low rank": torch.where(place <= 10, 1 / place, 0.0),
    }[kind]


KINDS = ["slow", "quick", "steep", "signal in noise", "flat", "low rank"]


def matrix_of(kind: str, o: int, n: int, seed: int = 0) -> Tensor:
    """A float32 matrix with this spectrum, to rounding."""
    short = min(o, n)
    left, right = (torch.linalg.qr(numbers(side, short, seed=seed + side)).Q for side in (o, n))
    return ((left * spectrum(kind, short)) @ right.T).float()


def least_error(matrix: Tensor, rank: int) -> float:
    """Eckart and Young's, by NumPy in float64."""
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    return math.sqrt(float((values[rank:] ** 2).sum()))


def error_made(found: Decomposition, matrix: Tensor, rank: int) -> float:
    u, vt = found.vectors(rank)
    made = (u.double() * found.values[:rank].to(u.device)) @ vt.double()
    return float((matrix.double() - made.cpu()).norm())


def check_orthonormal(found: Decomposition, tolerance: float = 1e-5) -> None:
    """Lengths of 1 and angles of 0, as far as values that are next to nothing have any."""
    u, vt = (vectors.double() for vectors in found.vectors(found.rank))
    count = int((found.values > 1e-5 * found.values[0]).sum())
    eye = torch.eye(count, dtype=torch.float64)
    for angles in (u.T @ u, vt @ vt.T):
        torch.testing.assert_close(angles[:count, :count], eye, rtol=0, atol=tolerance)


@pytest.fixture(params=["wide", "tall", "square"])
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    yield {"wide": (160, 420), "tall": (420, 160), "square": (256, 256)}[request.param]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_the_error_is_within_a_thousandth_of_the_least_possible(
    kind: str, rank: int, shape: tuple[int, int]
) -> None:
    matrix = matrix_of(kind, *shape)
    assert module._iteration_pays(min(shape), rank)
    found = dense_svd(matrix, rank)
    norm = float(matrix.double().norm())
    made, least = error_made(found, matrix, rank), least_error(matrix, rank)
    assert made <= 1.001 * least + 1e-6 * norm
    assert abs(found.error(rank) * norm - made) <= 1e-4 * made + 1e-6 * norm
    assert found.rank == rank and found.shape == shape
    check_orthonormal(found)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
def test_every_start_leads_within_the_tolerance(seed: int, tolerance: float) -> None:
    matrix = matrix_of("signal in noise", 200, 300)
    found = dense_svd(matrix, 30, seed=seed, tolerance=tolerance)
    assert error_made(found, matrix, 30) <= (1 + tolerance) * least_error(matrix, 30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [8, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_result_has_the_least_error(kind: str, rank: int, dtype: torch.dtype) -> None:
    matrix = matrix_of(kind, 150, 240).to(dtype)
    found = dense_svd(matrix, rank, exact=True)
    made, least = error_made(found, matrix, rank), least_error(matrix, rank)
    assert made <= (1 + 1e-7) * least + 2e-7 * float(matrix.double().norm())
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:rank]
    np.testing.assert_allclose(found.values.numpy(), expected, atol=1e-6 * expected[0])


@given(some.integers(1, 40), some.integers(1, 40), some.integers(1, 50), some.integers(0, 99))
@LAW
def test_small_matrices_are_decomposed_to_rounding(o: int, n: int, rank: int, seed: int) -> None:
    matrix = numbers(o, n, seed=seed)
    found = dense_svd(matrix, rank)
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert found.rank == min(rank, o, n)
    np.testing.assert_allclose(found.values.numpy(), expected[: found.rank], atol=1e-8 * expected[0])
    np.testing.assert_allclose(found.energy, (matrix.numpy() ** 2).sum(), rtol=1e-13)
    for kept in range(1, found.rank + 1):
        least = math.sqrt((expected[kept:] ** 2).sum())
        assert abs(error_made(found, matrix, kept) - least) <= 1e-8 * expected[0]
    check_orthonormal(found, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_numbers_are_read_as_they_are(dtype: torch.dtype) -> None:
    matrix = matrix_of("quick", 150, 200).to(dtype)
    found = dense_svd(matrix, 8)
    assert error_made(found, matrix.float(), 8) <= 1.001 * least_error(matrix.float(), 8)


@pytest.mark.parametrize("rank", [4, 100])
def test_a_matrix_of_zeros_has_no_values_and_no_vectors(rank: int) -> None:
    found = dense_svd(torch.zeros(150, 200), rank)
    assert found.energy == 0.0 and not bool(found.values.any())
    assert not any(bool(factor.any()) for factor in found.factors(rank))


@pytest.mark.parametrize(("kind", "rank"), [("slow", 16), ("slow", 100), ("flat", 4)])
def test_one_seed_gives_one_result_on_any_number_of_threads(kind: str, rank: int) -> None:
    matrix = matrix_of(kind, 256, 300)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results += pool.each(lambda rank: dense_svd(matrix, rank), [rank, rank])
        finally:
            torch.set_num_threads(before)
    for found in results[1:]:
        assert torch.equal(found.values, results[0].values)
        for one, other in zip(found.vectors(rank), results[0].vectors(rank), strict=True):
            assert torch.equal(one, other)


def test_the_largest_entry_of_a_left_vector_is_positive(shape: tuple[int, int]) -> None:
    u, _ = dense_svd(matrix_of("slow", *shape), 16).vectors(16)
    assert bool((u.gather(0, u.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_the_energy_of_millions_of_numbers_keeps_its_digits() -> None:
    matrix = numbers(2500, 2000, seed=1, dtype=torch.float32) + 3
    expected = float((matrix.numpy().astype(np.float64) ** 2).sum())
    assert abs(energy_of(matrix) / expected - 1) <= 1e-13


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [4, 100])
def test_a_matrix_that_is_not_finite_is_refused(value: float, rank: int) -> None:
    matrix = matrix_of("slow", 150, 200)
    matrix[100, 150] = value
    with pytest.raises(Refused) as caught:
        dense_svd(matrix, rank)
    assert caught.value.code == "nonfinite"


@pytest.mark.parametrize("rank", [8, 100])
def test_where_the_eigenproblem_does_not_converge_the_matrix_is_decomposed_whole(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise factorisations.NotConverged("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    matrix = matrix_of("slow", 150, 240)
    found = dense_svd(matrix, rank)
    assert error_made(found, matrix, rank) <= (1 + 1e-6) * least_error(matrix, rank)


def test_an_iteration_that_does_not_settle_gives_way_to_the_eigenproblem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_STEPS", 3)
    matrix = matrix_of("flat", 200, 300)
    found = dense_svd(matrix, 30, exact=True)
    assert error_made(found, matrix, 30) <= (1 + 1e-7) * least_error(matrix, 30)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [8, 100])
def test_an_accelerator_is_as_exact(kind: str, rank: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    matrix = matrix_of(kind, 240, 150)
    found = dense_svd(matrix.cuda(), rank)
    assert found.vectors(rank)[0].is_cuda and not found.values.is_cuda
    least = least_error(matrix, rank)
    assert error_made(found, matrix, rank) <= 1.001 * least + 1e-6 * float(matrix.norm())


@given(SIDE, SIDE, SIDE, SIDE, some.integers(0, 200), some.integers(0, 99))
@LAW
def test_a_kronecker_product_is_decomposed_through_its_factors(
    a: int, b: int, c: int, d: int, most: int, seed: int
) -> None:
    w1, w2 = numbers(a, b, seed=seed), numbers(c, d, seed=seed + 1).half()
    matrix = np.kron(w1.numpy(), w2.double().numpy())
    expected = np.linalg.svd(matrix, compute_uv=False)
    found = kronecker_svd(w1, w2, most)
    count = min(most, min(a, b) * min(c, d))
    assert found.shape == matrix.shape and found.rank == count
    np.testing.assert_allclose(found.values.numpy(), expected[:count], atol=1e-13 * expected[0])
    np.testing.assert_allclose(found.energy, (matrix**2).sum(), rtol=1e-12)
    for rank in {0, count // 2, count}:
        least = math.sqrt((expected[rank:] ** 2).sum())
        assert abs(error_made(found, torch.from_numpy(matrix), rank) - least) <= 1e-12 * expected[0]


@pytest.mark.parametrize("most", [4, 40])
def test_of_a_large_factor_only_the_largest_values_are_looked_for(most: int) -> None:
    w1, w2 = numbers(3, 2, seed=1), matrix_of("slow", 300, 400).double()
    singular = [np.linalg.svd(factor.numpy(), compute_uv=False) for factor in (w1, w2)]
    expected = np.sort(np.outer(*singular), axis=None)[::-1]
    found = kronecker_svd(w1, w2, most)
    np.testing.assert_allclose(found.values.numpy(), expected[:most], rtol=1e-6)
    np.testing.assert_allclose(found.energy, (expected**2).sum(), rtol=1e-12)
    least = math.sqrt((expected[most:] ** 2).sum())
    assert error_made(found, torch.kron(w1, w2), most) <= (1 + 1e-7) * least


def test_a_kronecker_product_is_found_again_in_its_matrix() -> None:
    w1, w2 = numbers(3, 4, seed=1), numbers(5, 6, seed=2)
    matrix = torch.kron(w1, w2)
    first, second, error = nearest_kronecker(matrix, (3, 4))
    torch.testing.assert_close(torch.kron(first, second), matrix, rtol=1e-12, atol=1e-12)
    assert error <= 1e-7
    torch.testing.assert_close(first.norm(), second.norm())


def test_no_kronecker_product_is_nearer_than_the_one_that_is_found() -> None:
    matrix = numbers(12, 20, seed=1)
    first, second, error = nearest_kronecker(matrix, (3, 4))
    distance = float((matrix - torch.kron(first, second)).norm())
    assert abs(distance / float(matrix.norm()) - error) <= 1e-12
    # The best second factor for a given first one is a projection, and the other way round.
    blocks = matrix.reshape(3, 4, 4, 5).transpose(1, 2)
    best_second = torch.einsum("ab,abcd->cd", first, blocks) / first.square().sum()
    best_first = torch.einsum("cd,abcd->ab", second, blocks) / second.square().sum()
    torch.testing.assert_close(best_second, second)
    torch.testing.assert_close(best_first, first)
    for seed in range(20):
        other = torch.kron(
            first + 0.1 * numbers(3, 4, seed=seed), second + 0.1 * numbers(4, 5, seed=seed + 50)
        )
        assert float((matrix - other).norm()) > distance


def test_blocks_that_do_not_fill_the_matrix_are_refused() -> None:
    with pytest.raises(Mismatch) as caught:
        nearest_kronecker(numbers(12, 20, seed=1), (5, 4))
    assert caught.value.code == "no-blocks" and caught.value.hint
