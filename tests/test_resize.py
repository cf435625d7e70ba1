"""resize: the best change of fewer ranks, whatever kind it was, held against dense SVDs in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from adapters import FORMS, File, Module, build, can, family, patterns, small_models, weight_of
from torch import Tensor

from adapterkit import resizing
from adapterkit.adapter import Adapter
from adapterkit.deltas import Change, LowRank, Whole, add
from adapterkit.errors import Refused, UsageError
from adapterkit.operations.resize import ResizeOptions, Resizing, resizable, resize
from adapterkit.ranks import RankRule
from adapterkit.specs.families import Place

LOW_RANK = ["lora", "lora with biases", "lora, core", "loha", "loha, core", "diff"] + [
    name for name in FORMS if name.startswith("lokr")
]
STAYING = ["oft", "boft", "ia3 of rows", "bias alone", "glora", "replacement"]


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_models():
        yield


def modules(form: str, to: str = "kohya", family_name: str = "sd1", most: int = 3) -> list[Module]:
    """Modules of several shapes that can have the form: linear layers, and convolutions of both kinds."""
    owner = family(family_name)[0]
    target, found = owner.target(to), {}
    for (component, _), rows in patterns(owner, target).items():
        network = owner.network(component)
        assert network is not None
        weight = weight_of(network, rows[0])
        assert weight is not None
        if FORMS[form].fits(weight) and can(target.layout, form, component, weight):
            found.setdefault(weight.kernel, []).append(Module(component, rows[0], form))
    return [module for several in found.values() for module in several[:most]]


def file_of(form: str, to: str = "kohya", **options: object) -> File:
    return build("sd1", to, modules(form, to), scale=0.5, **options)  # type: ignore[arg-type]


def dense(changes: tuple[Change, ...]) -> Tensor:
    delta = add([change for change in changes if not change.needs_base]).dense(dtype=torch.float64)
    return delta.flatten(1) if delta.ndim > 1 else delta


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def matrices(adapter: Adapter) -> dict[Place, Tensor]:
    return {
        place: dense(changes)
        for place, changes in adapter.changes.items()
        if place.param != "bias" and changes[0].shape[1:]
    }


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


def ranks(resized: Resizing) -> dict[Place, int]:
    """The ranks of the tensors that are written."""
    found = {}
    for place, changes in resized.plan.adapter.changes.items():
        for change in changes:
            if isinstance(change, LowRank):
                found[place] = change.rank
    return found


@pytest.mark.parametrize("form", LOW_RANK)
@pytest.mark.parametrize("rank", [1, 3])
def test_every_kind_becomes_the_best_change_of_that_rank(form: str, rank: int) -> None:
    adapter = file_of(form).read("sd1")
    resized = resize(adapter, rule=RankRule(rank=rank))
    expected = matrices(adapter)
    assert expected.keys() == resized.reduction.parts.keys() and expected
    for place, matrix in expected.items():
        made = dense(resized.plan.adapter.changes[place])
        assert relative(best(matrix, rank), made) < 1e-5
    assert set(ranks(resized).values()) <= set(range(1, rank + 1))


@pytest.mark.parametrize("form", LOW_RANK)
def test_the_predicted_error_is_the_error_made(form: str) -> None:
    adapter = file_of(form).read("sd1")
    resized = resize(adapter, rule=RankRule(rank=2))
    squares = [
        ((matrix - dense(resized.plan.adapter.changes[place])).square().sum(), matrix.square().sum())
        for place, matrix in matrices(adapter).items()
    ]
    made = (sum(one for one, _ in squares) / sum(two for _, two in squares)) ** 0.5
    assert resized.reduction.error == pytest.approx(float(made), rel=1e-4, abs=1e-6)
    assert 0.05 < float(made) < 1


@pytest.mark.parametrize("form", STAYING)
def test_what_is_no_sum_of_ranks_stays_and_is_counted(form: str) -> None:
    beside = modules("lora")[:1]
    others = [module for module in modules(form) if module.row != beside[0].row]
    adapter = build("sd1", "kohya", [*others, *beside]).read("sd1")
    resized = resize(adapter, rule=RankRule(rank=1))
    assert sum(resized.stayed.values()) == len(others)
    assert len(resized.reduction.parts) == 1
    for place, changes in adapter.changes.items():
        if place not in resized.reduction.parts:
            assert all(
                one is two for one, two in zip(changes, resized.plan.adapter.changes[place], strict=True)
            )


def test_biases_beside_a_resized_layer_stay_bit_for_bit() -> None:
    adapter = file_of("lora with biases").read("sd1")
    resized = resize(adapter, rule=RankRule(rank=1))
    biases = {place: changes for place, changes in adapter.changes.items() if place.param == "bias"}
    assert biases and all(resized.plan.adapter.changes[place] == changes for place, changes in biases.items())


@pytest.mark.parametrize("rule", [RankRule(rank=4), RankRule(rank=999), RankRule(), RankRule(energy=1.0)])
def test_where_nothing_is_cut_off_the_very_tensors_are_written(rule: RankRule) -> None:
    file = file_of("lora", dtype=torch.float16)
    written = resize(file.read("sd1"), rule=rule).state_dict()
    assert written.keys() == file.tensors.keys()
    assert all(torch.equal(tensor, file.tensors[key]) for key, tensor in written.items())


def test_a_module_of_lower_rank_stays_as_it_is() -> None:
    file = file_of("lora")
    name = next(key for key in file.tensors if key.endswith("lora_down.weight"))
    narrow = {
        name: file.tensors[name][:1],
        name.replace("down", "up"): file.tensors[name.replace("down", "up")][:, :1],
    }
    file = File({**file.tensors, **narrow}, file.metadata)
    written = resize(file.read("sd1"), rule=RankRule(rank=2)).state_dict()
    assert all(torch.equal(written[key], tensor) for key, tensor in narrow.items())


@pytest.mark.parametrize("form", ["lora", "loha", "lokr, both factored"])
def test_the_scale_stays_so_that_alpha_follows_the_rank(form: str) -> None:
    resized = resize(file_of(form).read("sd1"), rule=RankRule(rank=2))
    tensors = resized.state_dict()
    alphas = {key: float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")}
    assert alphas
    for key, alpha in alphas.items():
        down = tensors[key.replace(".alpha", ".lora_down.weight")]
        assert alpha == 0.5 * down.shape[0]


def test_factors_share_the_size_of_the_change() -> None:
    """Each carries the square root of a singular value, so that half precision holds both."""
    resized = resize(file_of("lora").read("sd1"), rule=RankRule(rank=2))
    for place, part in resized.reduction.parts.items():
        (change,) = resized.plan.adapter.changes[place]
        assert isinstance(change, LowRank)
        roots = (part.decomposition.values[:2] / 0.5).sqrt().float()
        up, down = change.matrices()
        assert torch.allclose(up.norm(dim=0), roots, rtol=1e-4)
        assert torch.allclose(down.norm(dim=1), roots, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_factors_are_written_in_the_dtype_asked_for(dtype: str) -> None:
    resized = resize(file_of("loha").read("sd1"), rule=RankRule(rank=2), options=ResizeOptions(dtype=dtype))
    found = {tensor.dtype for key, tensor in resized.state_dict().items() if ".lora_" in key}
    assert found == {{"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["lora", "loha", "lokr", "diff"])
def test_factors_keep_the_dtype_that_the_file_has(form: str, dtype: torch.dtype) -> None:
    resized = resize(file_of(form, dtype=dtype).read("sd1"), rule=RankRule(rank=2))
    assert {t.dtype for key, t in resized.state_dict().items() if ".lora_" in key} == {dtype}


@pytest.mark.parametrize("size", [14_000, 16_001, 20_000, 40_000])
@pytest.mark.parametrize("to", ["kohya", "peft", "diffusers"])
def test_the_file_is_never_larger_than_asked(tmp_path, size: int, to: str) -> None:
    adapter = build("sd1", "kohya", modules("lora", to, most=5)).read("sd1")
    resized = resize(adapter, tmp_path / "out", RankRule(size=size), ResizeOptions(to=to))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()] or [tmp_path / "out"]
    total = sum(path.stat().st_size for path in files)
    assert total == resized.reduction.size <= size
    column = max(part.spectrum(torch.float32).cost for part in resized.reduction.parts.values())
    full = all(resized.reduction.ranks[place] == part.full for place, part in resized.reduction.parts.items())
    assert full or total > size - column - 200


def test_a_size_that_is_too_small_is_refused_with_one_that_is_not() -> None:
    adapter = file_of("lora").read("sd1")
    with pytest.raises(UsageError) as caught:
        resize(adapter, rule=RankRule(size=100))
    smallest = caught.value.details["smallest"]
    assert (
        resize(adapter, rule=RankRule(size=int(str(smallest)) + 8)).reduction.size <= int(str(smallest)) + 8
    )


@pytest.mark.parametrize("rule", [RankRule(error=0.2), RankRule(energy=0.96)])
def test_an_error_is_kept_to_over_all_modules(rule: RankRule) -> None:
    resized = resize(file_of("lora").read("sd1"), rule=rule)
    assert 0.15 < resized.reduction.error <= 0.2 * (1 + 1e-9)


def test_convolutions_have_a_rank_of_their_own() -> None:
    resized = resize(file_of("lora").read("sd1"), rule=RankRule(rank={"conv": 1, "linear": 3}))
    by_kernel = {
        len(change.down.shape) > 2 and change.down.shape[-1] > 1: change.rank
        for changes in resized.plan.adapter.changes.values()
        for change in changes
        if isinstance(change, LowRank)
    }
    assert by_kernel == {True: 1, False: 3}


def test_modules_that_change_nothing_are_left_out_and_counted() -> None:
    file = file_of("lora")
    up = next(key for key in file.tensors if key.endswith("lora_up.weight"))
    adapter = File({**file.tensors, up: torch.zeros_like(file.tensors[up])}, file.metadata).read("sd1")
    resized = resize(adapter, rule=RankRule(rank=2))
    assert len(resized.reduction.left_out) == 1
    assert up not in resized.state_dict()
    assert set(resized.plan.receipt.dropped) >= {up} and resized.plan.receipt.balances


def test_an_adapter_that_changes_nothing_at_all_is_refused() -> None:
    file = file_of("lora")
    zeros = {key: torch.zeros_like(t) if "up" in key else t for key, t in file.tensors.items()}
    with pytest.raises(Refused) as caught:
        resize(File(zeros, file.metadata).read("sd1"), rule=RankRule(rank=2))
    assert caught.value.code == "nothing-left"


def test_a_module_that_is_not_finite_is_refused_by_name_or_stays_by_consent() -> None:
    file = file_of("lora")
    up = next(key for key in file.tensors if key.endswith("lora_up.weight"))
    broken = file.tensors[up].clone()
    broken[0, 0] = torch.nan
    file = File({**file.tensors, up: broken}, file.metadata)
    with pytest.raises(Refused) as caught:
        resize(file.read("sd1"), rule=RankRule(rank=2))
    assert caught.value.code == "nonfinite" and up.removesuffix(".lora_up.weight") in caught.value.message
    resized = resize(
        file.read("sd1"), rule=RankRule(rank=2), options=ResizeOptions(allow=frozenset({"nonfinite"}))
    )
    assert len(resized.faulty) == 1
    assert torch.equal(resized.state_dict()[up], broken) is False  # NaN is not equal to itself
    assert torch.equal(resized.state_dict()[up].nan_to_num(7.0), broken.nan_to_num(7.0))


def test_changes_of_one_weight_are_added_up_before_they_are_cut() -> None:
    """A LoRA and a whole delta of the same weight: the best rank of their sum, not of each."""
    lora, whole = (
        build("sd1", "kohya", modules(form)[:1], seed=seed) for seed, form in enumerate(("lora", "diff"))
    )
    adapter = File({**lora.tensors, **whole.tensors}, lora.metadata).read("sd1")
    (place,) = [place for place in adapter.changes if place.param != "bias"]
    resized = resize(adapter, rule=RankRule(rank=2))
    (made,) = resized.plan.adapter.changes[place]
    assert relative(best(dense(adapter.changes[place]), 2), dense((made,))) < 1e-5


def test_a_whole_delta_stays_where_factors_would_be_no_smaller() -> None:
    adapter = file_of("diff").read("sd1")
    resized = resize(adapter)
    changes = [change for several in resized.plan.adapter.changes.values() for change in several]
    assert changes and all(isinstance(change, Whole) for change in changes)
    assert resized.reduction.error == 0.0


@pytest.mark.parametrize(
    "rule", [RankRule(), RankRule(rank={"conv": 2}), RankRule(error=0.05), RankRule(energy=0.999)]
)
def test_a_whole_delta_of_more_values_than_are_looked_for_stays_where_all_are_wanted(
    monkeypatch: pytest.MonkeyPatch, rule: RankRule
) -> None:
    monkeypatch.setattr(resizing, "_MOST_OF_WHOLE", 4)
    layers = [module for module in modules("diff", most=9) if not module.row.native.endswith("conv")]
    adapter = build("sd1", "kohya", layers, scale=0.5).read("sd1")
    resized = resize(adapter, rule=rule)
    pairs = [
        (matrix, dense(resized.plan.adapter.changes[place]))
        for place, matrix in matrices(adapter).items()
        if resized.reduction.parts[place].layer == "linear" or rule.rank is None
    ]
    left = sum(float((one - two).square().sum()) for one, two in pairs)
    permitted = rule.error or math.sqrt(1 - (rule.energy or 1.0))
    assert math.sqrt(left / sum(float(one.square().sum()) for one, _ in pairs)) <= permitted + 1e-7


@pytest.mark.parametrize("to", ["diffusers", "peft", "kohya", "comfyui"])
def test_ranks_are_counted_on_the_tensors_of_the_output(to: str) -> None:
    """FLUX: a fused q, k and v is one module for kohya and three for diffusers."""
    owner = family("flux1")[0]
    fused = [m for m in modules("lora", "kohya", "flux1", 99) if len(m.row.span) > 1][:2]
    assert fused
    adapter = build(owner.name, "kohya", fused).read(owner.name)
    resized = resize(adapter, rule=RankRule(rank=2), options=ResizeOptions(to=to))
    assert set(ranks(resized).values()) == {2}
    split = to in {"diffusers", "peft"}
    assert (len(ranks(resized)) > len(fused)) is split
    for place, change in resized.plan.adapter.changes.items():
        whole = next(p for p in adapter.changes if place.span[0].module in {piece.module for piece in p.span})
        first = sum(
            piece.weight for piece in whole.span[: [q.module for q in whole.span].index(place.span[0].module)]
        )
        unit = adapter.changes[whole][0].shape[0] // sum(piece.weight for piece in whole.span)
        rows = change[0].shape[0]
        expected = dense(adapter.changes[whole])[first * unit : first * unit + rows]
        assert relative(best(expected, 2), dense(change)) < 1e-5


def test_several_rules_share_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit import resizing

    calls = []
    original = resizing.decompose
    monkeypatch.setattr(resizing, "decompose", lambda *a, **k: calls.append(1) or original(*a, **k))
    ready = resizable(file_of("lora").read("sd1"), rules=[RankRule(rank=1), RankRule(rank=3)])
    one, three = ready.at(RankRule(rank=1)), ready.at(RankRule(rank=3))
    assert len(calls) == 1
    assert (set(ranks(one).values()), set(ranks(three).values())) == ({1}, {3})


def test_the_curve_is_what_the_rules_would_give() -> None:
    ready = resizable(file_of("lora").read("sd1"))
    points = ready.curve()
    assert [point.rank for point in points] == [1, 2, 4]
    for point in points:
        same = ready.at(RankRule(rank=point.rank)).reduction
        assert point.error == pytest.approx(same.error, abs=1e-6)
        assert abs(point.size - same.size) < 200
        assert point.shared <= point.error + 1e-12


def test_the_same_request_writes_the_same_bytes(tmp_path) -> None:
    adapter = file_of("loha").read("sd1")
    written = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            path = tmp_path / f"{threads}.safetensors"
            resize(adapter, path, RankRule(energy=0.9))
            written.append(path.read_bytes())
        finally:
            torch.set_num_threads(before)
    assert written[0] == written[1]


def test_the_written_file_is_measured_and_says_how_it_was_made(tmp_path) -> None:
    file = file_of("lora")
    adapter = File(file.tensors, {"ss_network_dim": "4", "ss_network_alpha": "2"}).read("sd1")
    resized = resize(adapter, tmp_path / "small.safetensors", RankRule(rank=2))
    assert resized.measured == pytest.approx(resized.reduction.error, rel=1e-4)
    from safetensors import safe_open

    with safe_open(tmp_path / "small.safetensors", "pt") as found:
        metadata = found.metadata()
    assert metadata["ss_network_dim"] == "2" and metadata["ss_network_alpha"] == "1"
    assert json.loads(metadata["adapterkit"]) == [{"operation": "resize", "rank": 2}]


def test_a_state_dict_in_memory_can_be_resized_while_training() -> None:
    resized = resize(dict(file_of("lora").tensors), None, RankRule(rank=1), ResizeOptions(family="sd1"))
    tensors = resized.state_dict()
    assert {t.shape[0] for key, t in tensors.items() if key.endswith("lora_down.weight")} == {1}


def test_an_adapter_of_its_own_can_be_resized_again() -> None:
    once = resize(file_of("lora").read("sd1"), rule=RankRule(rank=3))
    again = resize(once.plan.adapter, rule=RankRule(rank=2))
    direct = resize(file_of("lora").read("sd1"), rule=RankRule(rank=2))
    for place, change in direct.plan.adapter.changes.items():
        assert relative(dense(change), dense(again.plan.adapter.changes[place])) < 1e-5


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    resize(file_of("lora").read("sd1"), rule=RankRule(rank=1), progress=lambda *step: seen.append(step))
    assert seen and all(done <= total for _, done, total in seen) and seen[-1][1] == seen[-1][2]


def test_auto_finds_the_ranks_that_stand_out_of_a_flat_tail() -> None:
    from adapterkit.resizing import noise_of

    for planted in (1, 3, 8):
        generator = torch.Generator().manual_seed(planted)
        up = 0.01 * torch.randn(320, 32, generator=generator)
        up[:, :planted] += torch.randn(320, planted, generator=generator)
        down = torch.linalg.qr(torch.randn(256, 32, generator=generator)).Q.T.contiguous()
        change = LowRank(up, down, 0.5)
        from adapterkit.decompose import decompose

        found = decompose({"x": change})["x"]
        assert int((found.values > noise_of(change, found)).sum()) == planted


def test_auto_takes_a_change_that_uses_all_of_its_ranks_for_no_noise() -> None:
    resized = resize(file_of("lora").read("sd1"), rule=RankRule(auto=True))
    assert set(ranks(resized).values()) == {4}


@pytest.mark.parametrize("form", ["oft", "ia3 of rows", "replacement"])
def test_an_adapter_without_ranks_is_refused(form: str) -> None:
    with pytest.raises(Refused) as caught:
        resize(file_of(form).read("sd1"), rule=RankRule(rank=2))
    assert caught.value.code == "no-ranks" and caught.value.hint


def test_auto_keeps_a_spectrum_that_only_falls() -> None:
    """A tail that goes on falling is no noise: nothing of a power law is thrown away."""
    from adapterkit.decompose import decompose
    from adapterkit.resizing import noise_of

    generator = torch.Generator().manual_seed(0)
    up = torch.linalg.qr(torch.randn(320, 32, generator=generator)).Q
    down = torch.linalg.qr(torch.randn(256, 32, generator=generator)).Q.T
    change = LowRank((up / torch.arange(1, 33)).half(), down.contiguous().half())
    found = decompose({"x": change})["x"]
    assert noise_of(change, found) < float(found.values[-1])
