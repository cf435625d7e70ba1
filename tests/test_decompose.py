"""Every change that is a matrix is decomposed as its delta would be, whatever form it has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from deltas_cases import CASES, Case
from torch import Tensor

from adapterkit import decompose as module
from adapterkit.decompose import decompose
from adapterkit.deltas import Change, Hadamard, Kronecker, LowRank, Whole
from adapterkit.errors import AdapterkitError, Refused, Unrepresentable
from adapterkit.linalg import factorisations
from adapterkit.linalg.decomposition import Decomposition

DECOMPOSED = [
    *("lora", "lora, convolution", "lora, 1x1 convolution", "lora, one axis of convolution", "lora, mid"),
    *("lora, half precision", "lora, eight bits", "embedding", "loha", "loha, convolution", "loha, core"),
    *("lokr", "lokr, second factored", "lokr, both factored", "lokr, convolution", "lokr, core"),
    *("lokr, factored convolution", "diff", "adalora", "vera"),
]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_delta(found: Decomposition, delta: Tensor, tolerance: float) -> None:
    """All values, the energy, and a truncation, against NumPy's SVD of the delta."""
    matrix = delta.double().flatten(1).numpy()
    expected = np.linalg.svd(matrix, compute_uv=False)
    assert found.shape == matrix.shape
    np.testing.assert_allclose(found.values.numpy(), expected[: found.rank], atol=tolerance * expected[0])
    assert np.all(expected[found.rank :] <= tolerance * expected[0])
    np.testing.assert_allclose(found.energy, (matrix**2).sum(), rtol=10 * tolerance)
    for rank in (1, found.rank):
        up, down = found.factors(rank, 0.5)
        made = float((torch.from_numpy(matrix) - 0.5 * (up.double() @ down.double())).norm())
        least = math.sqrt((expected[rank:] ** 2).sum())
        assert abs(made - least) <= 10 * tolerance * expected[0]


@pytest.mark.parametrize("name", DECOMPOSED)
def test_a_change_is_decomposed_as_its_definition_says(name: str) -> None:
    case: Case = CASES[name]()
    found = decompose({name: case.change})[name]
    # A factor that has to be multiplied out beforehand is rounded to float32 where it is stored narrower.
    narrow = any(tensor.dtype.itemsize < 8 for tensor in case.change.tensors().values())
    check_delta(found, case.expected - case.base, 1e-6 if narrow else 1e-12)


@pytest.mark.parametrize("scale", [-0.5, 3.0])
def test_a_scale_and_its_sign_are_part_of_the_change(scale: float) -> None:
    changes: dict[str, Change] = {
        "lora": LowRank(numbers(9, 3, seed=1), numbers(3, 7, seed=2), scale),
        "lokr": Kronecker(w1=numbers(3, 2, seed=3), w2=numbers(4, 5, seed=4), scale=scale),
        "diff": Whole(numbers(9, 7, seed=5), scale=scale),
    }
    for name, found in decompose(changes).items():
        check_delta(found, changes[name].dense(dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(DECOMPOSED)))
def test_a_change_that_is_no_matrix_by_itself_is_refused_by_name(name: str) -> None:
    with pytest.raises(Unrepresentable, match="`the module`") as caught:
        decompose({7: CASES[name]().change}, names={7: "the module"})
    assert caught.value.hint


def several() -> dict[str, Change]:
    factors = [numbers(60, 6, seed=1), numbers(6, 50, seed=2), numbers(60, 6, seed=3), numbers(6, 50, seed=4)]
    return {
        "linear": LowRank(factors[0].half(), factors[1].half(), 0.5),
        "convolution": LowRank(numbers(40, 4, 1, 1, seed=5), numbers(4, 30, 3, 3, seed=6), -2.0),
        "another linear": LowRank(factors[2].bfloat16(), factors[3].bfloat16()),
        "loha": Hadamard(*factors, scale=0.1),
        "lokr": Kronecker(w1=numbers(4, 5, seed=7), w2=numbers(12, 10, seed=8), scale=0.3),
        "whole": Whole(numbers(150, 200, seed=9)),
        "untrained": LowRank(torch.zeros(60, 6), factors[1]),
    }


def check_same(a: Decomposition, b: Decomposition) -> None:
    assert a.energy == b.energy and torch.equal(a.values, b.values)
    for one, other in zip(a.vectors(3), b.vectors(3), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("most", [None, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_results_depend_neither_on_order_nor_on_threads_nor_on_company(
    threads: int, most: int | None
) -> None:
    changes, before = several(), torch.get_num_threads()
    alone = {key: decompose({key: change}, most=most)[key] for key, change in changes.items()}
    torch.set_num_threads(threads)
    try:
        forth = decompose(changes, most=most)
        back = decompose(dict(reversed(changes.items())), most=most)
    finally:
        torch.set_num_threads(before)
    assert list(forth) == list(changes)
    assert list(back) == list(reversed(changes))
    for key in changes:
        check_same(alone[key], forth[key])
        check_same(alone[key], back[key])


def test_progress_is_told_from_nothing_to_all() -> None:
    heard: list[tuple[str, int, int]] = []
    decompose(several(), progress=lambda *told: heard.append(told))
    assert heard == [("decompose", done, 7) for done in range(8)]


@pytest.mark.parametrize("most", [1, 4, 1000])
def test_only_as_many_values_are_kept_as_are_wanted(most: int) -> None:
    every = decompose(several())
    for key, found in decompose(several(), most=most, exact=True).items():
        assert found.rank == min(most, every[key].rank)
        torch.testing.assert_close(found.values, every[key].values[:most], rtol=1e-6, atol=1e-6)
        assert found.energy == pytest.approx(every[key].energy, rel=1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_a_change_of_very_many_ranks_is_cut_as_well_as_one_of_few(exact: bool) -> None:
    loha = Hadamard(*(numbers(*shape, seed=sum(shape)) for shape in ((160, 12), (12, 170)) * 2))
    assert module._by_factors(loha, module._Manner(8, exact, 1e-3, 0, torch.device("cpu"), False)) == exact
    found = decompose({"loha": loha}, most=8, exact=exact)["loha"]
    delta = loha.dense(None, torch.float64)
    up, down = found.factors(8)
    least = math.sqrt(float((torch.linalg.svdvals(delta)[8:] ** 2).sum()))
    assert float((delta - up.double() @ down.double()).norm()) <= (1 + (1e-6 if exact else 1e-3)) * least


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["linear", "convolution", "loha", "lokr", "whole"])
def test_a_module_that_is_not_finite_is_refused_by_name_or_left_out(key: str, value: float) -> None:
    changes = several()
    next(iter(changes[key].tensors().values())).view(-1)[3] = value
    with pytest.raises(Refused, match=f"`the {key}`") as caught:
        decompose(changes, names={key: f"the {key}"})
    assert caught.value.code == "nonfinite" and "--allow nonfinite" in caught.value.hint
    assert list(decompose(changes, allow={"nonfinite"})) == [other for other in changes if other != key]


def test_a_module_for_which_nothing_converges_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise factorisations.NotConverged("the algorithm failed to converge")

    def fails_too(*_: object, **__: object) -> None:
        raise factorisations.scipy.linalg.LinAlgError("SVD did not converge")

    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, fails)
    changes = {"linear": several()["linear"]}
    # The slowest and surest way remains.
    assert decompose(changes)["linear"].rank == 6
    monkeypatch.setattr(factorisations.scipy.linalg, "svd", fails_too)
    with pytest.raises(AdapterkitError, match="`linear`") as caught:
        decompose(changes)
    assert caught.value.code == "no-convergence"


def test_what_does_not_fit_on_the_device_is_done_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = module.dense_svd, []

    def narrow(matrix: Tensor, rank: int, **options: object) -> Decomposition:
        calls.append(rank)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(matrix, rank, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "dense_svd", narrow)
    whole = several()["whole"]
    check_same(decompose({"whole": whole}, most=8)["whole"], real(whole.dense(), 8))
    assert len(calls) == 2


def test_no_changes_have_no_decompositions() -> None:
    assert decompose({}) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("most", [None, 8])
def test_an_accelerator_gives_the_same_answers(most: int | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    here, there = decompose(several(), most=most), decompose(several(), most=most, device="cuda")
    for key, found in there.items():
        torch.testing.assert_close(found.values, here[key].values, rtol=1e-3, atol=1e-6)
        rank = min(3, found.rank)
        assert not any(factor.is_cuda for factor in found.factors(rank))
        assert found.error(rank) == pytest.approx(here[key].error(rank), rel=2e-3, abs=1e-6)
