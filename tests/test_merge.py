"""merge as an operation: what it writes is what its method asks for, and the rest is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import merging_papers as paper
import numpy as np
import pytest
import torch
from adapters import FORMS, File, Module, build, patterns, scratch, small_models, weight_of

from adapterkit import MergeOptions, load, merge, plan_merge
from adapterkit.adapter import Adapter
from adapterkit.alignment import aligned
from adapterkit.errors import AdapterkitError, Mismatch, Refused, StoreError, Unrepresentable, UsageError
from adapterkit.merging import METHODS
from adapterkit.metadata import output_metadata
from adapterkit.operations.merge import Merging
from adapterkit.ranks import RankRule
from adapterkit.reports.merging import merging_notes
from adapterkit.specs.families import Place, family
from adapterkit.stores import memory_store

ALL_RANKS = RankRule(rank=10_000)


@pytest.fixture(autouse=True)
def narrow() -> Iterator[None]:
    with small_models():
        yield


def modules(name: str, to: str, component: str, form: str, most: int = 4) -> list[Module]:
    owner = family(name)[0]
    network = owner.network(component)
    assert network is not None
    rows = [
        row
        for (part, _), rows in patterns(owner, owner.target(to)).items()
        for row in rows[:1]
        if part == component
    ]
    fitting = [row for row in rows if (w := weight_of(network, row)) and FORMS[form].fits(w)]
    # Those that another naming fuses or cuts come first: q, k and v.
    fitting.sort(key=lambda row: ("qkv" not in row.native and "attn" not in row.native, row.native))
    return [Module(component, row, form) for row in fitting[:most]]


def flux(to: str = "kohya", form: str = "lora", most: int = 4, **settings) -> File:
    return build("flux1", to, modules("flux1", to, "transformer", form, most), **settings)


def sd1(form: str = "lora", component: str = "unet", most: int = 6, **settings) -> File:
    return build("sd1", "kohya", modules("sd1", "kohya", component, form, most), **settings)


def deltas_of(adapter: Adapter, to: str) -> dict[Place, np.ndarray]:
    """Every delta in float64 on the lines of a target, all changes of a place added up."""
    found = {}
    lines = aligned(adapter, adapter.family.target(to), as_lora=True)
    for place, changes in lines.changes.items():
        total = sum(change.dense(dtype=torch.float64) for change in changes)
        found[place] = total.flatten(1).numpy() if total.ndim > 1 else total.numpy()
    return found


def made(done: Merging) -> Adapter:
    """What the plan writes, read again."""
    store = memory_store(done.plan.state_dict(), output_metadata(done.plan))
    return load(store, family=done.plan.adapter.family.key)


def check(done: Merging, wanted: Mapping[Place, np.ndarray], tolerance: float = 3e-6) -> None:
    """The output makes exactly these deltas; what is zero may be left out."""
    ours = deltas_of(made(done), done.plan.target.name)
    assert ours.keys() <= wanted.keys()
    for place, expected in wanted.items():
        size = np.linalg.norm(expected)
        delta = ours.get(place, np.zeros_like(expected))
        assert np.linalg.norm(delta.reshape(expected.shape) - expected) <= tolerance * size, place
    assert done.receipt.balances


def summed(files: Sequence[File], strengths: Sequence[float], to: str, name: str) -> dict[Place, np.ndarray]:
    total: dict[Place, np.ndarray] = {}
    for file, strength in zip(files, strengths, strict=True):
        for place, delta in deltas_of(file.read(name), to).items():
            total[place] = total.get(place, 0.0) + strength * delta.reshape(delta.shape)
    return total


def plan(files: Sequence[File], strengths: Sequence[float] | None = None, **settings) -> Merging:
    rule = settings.pop("rule", None)
    options = MergeOptions(**{"family": "flux1", **settings})
    return plan_merge([file.store() for file in files], strengths, rule, options)


def refused(kind: type[AdapterkitError], files: Sequence[File], *strengths: float, **settings):
    with pytest.raises(kind) as caught:
        plan(files, strengths or None, **settings)
    assert caught.value.hint
    return caught.value


# --- the plain sum --------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [None, "kohya", "diffusers", "comfyui"])
def test_linear_is_the_sum_of_the_deltas_whatever_the_formats(to) -> None:
    files, strengths = [flux("kohya", seed=1, scale=0.5), flux("diffusers", seed=2, scale=2.0)], [0.8, -0.3]
    done = plan(files, strengths, to=to)
    check(done, summed(files, strengths, to or "kohya", "flux1"))
    assert done.plan.target.name == (to or "kohya") and done.reduction is None and done.error == 0


FORMS_WITH_DELTAS = [
    "lora",
    "lora, core",
    "loha",
    "loha, core",
    "lokr, second factored",
    "lokr, core",
    "lokr",
    "diff",
    "diff with biases",
]


@pytest.mark.parametrize("form", FORMS_WITH_DELTAS)
def test_linear_is_the_sum_of_the_deltas_whatever_the_kinds(form) -> None:
    files, strengths = [sd1(form, seed=1, scale=0.5), sd1("lora", seed=2)], [0.7, 1.3]
    check(plan(files, strengths, family="sd1"), summed(files, strengths, "kohya", "sd1"))


def test_merging_is_linear_in_the_deltas() -> None:
    """merge(a·x, b·y) = a·x + b·y: no term of one adapter's up with another's down."""
    a, b, c = (flux(seed=seed) for seed in (1, 2, 3))
    one = summed([a], [1.0], "kohya", "flux1")
    pair = plan([b, c], [2.0, -1.0])
    check(plan([a, b, c], [0.0, 2.0, -1.0]), deltas_of(made(pair), "kohya"))
    rest = deltas_of(made(pair), "kohya")
    check(plan([a, b, c], [0.5, 2.0, -1.0]), {place: 0.5 * one[place] + rest[place] for place in one})


def test_a_module_that_an_input_has_not_is_zero_there() -> None:
    files = [flux(seed=1, most=5), flux(seed=2, most=2)]
    done = plan(files, [0.5, 0.5])
    check(done, summed(files, [0.5, 0.5], "kohya", "flux1"))
    ranks = sorted(module.scale.rank for module in done.plan.modules if module.scale)
    assert ranks == [4, 4, 4, 8, 8]


def test_one_adapter_alone_is_scaled_and_keeps_its_tensors() -> None:
    file = flux("kohya", "lokr, second factored", seed=1, scale=0.5)
    done = plan([file], [-0.5])
    check(done, summed([file], [-0.5], "kohya", "flux1"))
    state = done.plan.state_dict()
    assert state.keys() == file.tensors.keys()
    same = [key for key, tensor in state.items() if torch.equal(tensor, file.tensors[key])]
    assert len(same) == 2 * len(done.plan.modules)


def test_a_negative_strength_leaves_no_negative_alpha() -> None:
    done = plan([flux(seed=1), flux(seed=2)], [-1.0, -0.5])
    assert all(module.scale is None or module.scale.scale > 0 for module in done.plan.modules)


def test_ranks_above_those_of_the_weight_are_not_written() -> None:
    files = [flux("kohya", "lokr", seed=seed) for seed in (1, 2)]
    done = plan(files, [1.0, 0.5])
    check(done, summed(files, [1.0, 0.5], "kohya", "flux1"))
    for change in (change for several in made(done).changes.values() for change in several):
        assert change.rank <= min(change.shape[0], int(np.prod(change.shape[1:])))


def test_the_strength_of_the_whole_multiplies_every_method() -> None:
    files = [sd1("diff with biases", seed=1, most=3), sd1("lora", seed=2, most=3)]
    for method in METHODS:
        settings = {"method": method, "rule": ALL_RANKS, "family": "sd1"}
        one, two = (deltas_of(made(plan(files, strength=s, **settings)), "kohya") for s in (1.0, 2.5))
        assert one.keys() == two.keys()
        assert all(np.allclose(2.5 * one[place], two[place], atol=1e-4) for place in one), method


# --- the other methods ----------------------------------------------------------------------------


def reference(method: str, matrices: list[np.ndarray], weights: list[float]) -> np.ndarray:
    match method:
        case "linear" | "svd":
            return sum(w * m for w, m in zip(weights, matrices, strict=True))
        case "ties":
            return paper.ties(matrices, weights, 0.5)
        case "magnitude":
            return sum(w * paper.trim(m, 0.5) for w, m in zip(weights, matrices, strict=True))
        case "knots":
            return paper.knots(matrices, weights, 0.5)
        case "core":
            return paper.core(matrices, weights, 0.5)
        case "tsv":
            return paper.tsv(matrices, weights)
        case "iso-c":
            return paper.iso(matrices, weights)
    raise AssertionError(method)


@pytest.mark.parametrize("method", [name for name in METHODS if "dare" not in name])
def test_the_output_makes_what_the_method_asks_for(method) -> None:
    """On the lines of the output: of a fused weight as one."""
    files, strengths = [flux("kohya", seed=1, scale=0.5), flux("diffusers", seed=2, most=6)], [0.8, -0.3]
    each = [deltas_of(file.read("flux1"), "kohya") for file in files]
    wanted = {}
    for place in dict.fromkeys(place for one in each for place in one):
        there = [(one[place], s) for one, s in zip(each, strengths, strict=True) if place in one]
        wanted[place] = reference(method, [delta for delta, _ in there], [s for _, s in there])
    check(plan(files, strengths, method=method, rule=ALL_RANKS), wanted, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_inputs_does_not_matter(method) -> None:
    a, b = ({"one": flux(seed=1), "two": flux(seed=2, most=3)}[name].store() for name in ("one", "two"))
    a.path, b.path = Path("one.safetensors"), Path("two.safetensors")
    settings = MergeOptions(method=method, family="flux1", density=0.4, seed=3)
    forward = deltas_of(made(plan_merge([a, b], [0.8, -0.3], ALL_RANKS, settings)), "kohya")
    backward = deltas_of(made(plan_merge([b, a], [-0.3, 0.8], ALL_RANKS, settings)), "kohya")
    assert all(np.allclose(forward[place], backward[place], atol=1e-5) for place in forward | backward)


@pytest.mark.parametrize("method", METHODS)
def test_threads_do_not_matter(method) -> None:
    files = [flux(seed=1), flux("diffusers", seed=2)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(plan(files, [0.8, 0.3], method=method).plan.state_dict())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())


def test_vectors_take_part_in_methods_that_average() -> None:
    files = [sd1("diff with biases", seed=seed, most=2) for seed in (1, 2)]
    each = [deltas_of(file.read("sd1"), "kohya") for file in files]
    ours = deltas_of(made(plan(files, [1.0, 1.0], method="ties", rule=ALL_RANKS, family="sd1")), "kohya")
    vectors = [place for place, delta in each[0].items() if delta.ndim == 1]
    assert vectors
    for place in vectors:
        assert np.allclose(ours[place], paper.ties([one[place] for one in each], [1.0, 1.0], 0.5), atol=1e-6)


# --- ranks ----------------------------------------------------------------------------------------


def test_svd_keeps_the_largest_rank_of_the_inputs_and_is_the_best_of_that_rank() -> None:
    files, strengths = [flux(seed=1, most=3), flux(seed=2, most=3)], [1.0, 0.5]
    done = plan(files, strengths, method="svd")
    ours = deltas_of(made(done), "kohya")
    left = whole = 0.0
    for place, delta in summed(files, strengths, "kohya", "flux1").items():
        values = np.linalg.svd(delta, compute_uv=False)
        assert np.linalg.matrix_rank(ours[place], tol=1e-4) == 4
        assert np.linalg.norm(ours[place] - delta) == pytest.approx(
            np.sqrt((values[4:] ** 2).sum()), rel=1e-4
        )
        left, whole = left + (values[4:] ** 2).sum(), whole + (values**2).sum()
    assert done.error == pytest.approx(np.sqrt(left / whole), rel=1e-5)


@pytest.mark.parametrize("method", ["svd", "ties", "dare"])
def test_without_a_rule_each_module_gets_the_largest_rank_that_it_has_in_an_input(method) -> None:
    """And a whole delta stays whole, whatever the ranks elsewhere."""
    whole = sd1("diff", seed=1, most=2)
    rest = [
        m
        for m in modules("sd1", "kohya", "unet", "lora", 6)
        if m not in modules("sd1", "kohya", "unet", "lora", 2)
    ]
    lora = build("sd1", "kohya", rest, seed=2)
    first = File({**whole.tensors, **lora.tensors})
    done = plan([first, build("sd1", "kohya", rest, seed=3)], method=method, family="sd1")
    ranks = {place.span[0].module: rank for place, rank in done.reduction.ranks.items()}
    shapes = {
        place.span[0].module: min(delta.shape)
        for place, delta in deltas_of(whole.read("sd1"), "kohya").items()
    }
    assert {module: rank for module, rank in ranks.items() if module in shapes} == shapes or method == "dare"
    assert {rank for module, rank in ranks.items() if module not in shapes} == {4}


def test_rank_rules_hold(tmp_path) -> None:
    files = [flux(seed=1), flux(seed=2)]
    assert plan(files, rule=RankRule(error=0.1)).error <= 0.1
    assert plan(files, rule=RankRule(energy=0.9)).reduction.energy >= 0.9
    assert set(plan(files, rule=RankRule(rank=3)).reduction.ranks.values()) == {3}
    assert max(plan(files, rule=RankRule(most=5)).reduction.ranks.values()) == 5
    path = tmp_path / "small.safetensors"
    stores = [file.store() for file in files]
    merge(stores, None, path, RankRule(size=20_000), MergeOptions(family="flux1"))
    assert 15_000 < path.stat().st_size <= 20_000


def test_the_error_measured_is_that_of_ranks_and_rounding(tmp_path) -> None:
    stores = [flux(seed=seed, dtype=torch.float16).store() for seed in (1, 2)]
    options = MergeOptions(method="svd", family="flux1", verify="full", force=True)
    path = tmp_path / "merged.safetensors"
    done = merge(stores, [0.7, 0.3], path, None, options)
    assert done.measured == pytest.approx(done.error, rel=1e-3)
    exact = merge(stores, [0.7, 0.3], path, None, replace(options, method="linear"))
    assert 0 < exact.measured < 2**-9
    assert merge(stores, [0.7, 0.3], path, None, replace(options, verify="none")).measured is None


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "asked", "written"),
    [
        ((torch.float16, torch.float16), None, "F16"),
        ((torch.bfloat16, torch.bfloat16), None, "BF16"),
        ((torch.float16, torch.bfloat16), None, "F32"),
        ((torch.float16, torch.float32), None, "F32"),
        ((torch.float16, torch.bfloat16), "bf16", "BF16"),
        ((torch.float16, torch.float16), "fp32", "F32"),
    ],
)
@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_factors_have_the_widest_dtype_of_the_inputs_or_the_one_asked_for(
    method, dtypes, asked, written
) -> None:
    files = [flux(seed=seed, dtype=dtype) for seed, dtype in enumerate(dtypes)]
    done = plan(files, [0.7, 0.3], dtype=asked, method=method)
    assert {info.dtype for info in done.plan.header() if len(info.shape) > 1} == {written}
    if written == "F32" and method == "linear":
        check(done, summed(files, [0.7, 0.3], "kohya", "flux1"))


# --- what has no sum ------------------------------------------------------------------------------


def test_dora_with_another_adapter_is_refused_by_name() -> None:
    error = refused(Unrepresentable, [flux(form="dora of rows", seed=1), flux(seed=2)])
    assert error.code == "merge-kind" and "lora_unet_" in error.message and "`input 1`" in error.message
    assert "--base" in error.hint and "--allow magnitude" in error.hint


def test_dora_alone_at_strength_1_stays_as_it_is() -> None:
    dora, other = flux(form="dora of rows", seed=1, most=1), flux(seed=2, most=3)
    others = {
        key: t
        for key, t in other.tensors.items()
        if key.split(".")[0] not in {k.split(".")[0] for k in dora.tensors}
    }
    done = plan([dora, File(others)])
    state = done.plan.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in dora.tensors.items())
    assert refused(Unrepresentable, [dora, File(others)], 0.5, 1.0).code == "strength"


def test_dora_without_its_magnitudes_is_merged_by_consent_and_counted() -> None:
    dora, other = flux(form="dora of rows", seed=1), flux(seed=2)
    bare = File({key: tensor for key, tensor in dora.tensors.items() if "dora_scale" not in key})
    done = plan([dora, other], allow={"magnitude"})
    check(done, summed([bare, other], [1.0, 1.0], "kohya", "flux1"))
    assert list(done.receipt.dropped.values()) == ["magnitude"] * 4


@pytest.mark.parametrize("form", ["oft", "ia3 of rows", "glora", "replacement"])
def test_changes_that_depend_on_the_weight_are_refused_where_they_meet_others(form) -> None:
    error = refused(Unrepresentable, [sd1(form, seed=1), sd1("lora", seed=2)], family="sd1")
    assert error.code == "merge-kind" and error.details["module"]


def test_replacements_that_all_inputs_agree_on_pass() -> None:
    file = sd1("replacement", seed=1, most=2)
    done = plan([file, file], [0.3, 0.9], family="sd1")
    assert all(torch.equal(done.plan.state_dict()[key], tensor) for key, tensor in file.tensors.items())
    assert refused(Unrepresentable, [file, sd1("replacement", seed=2, most=2)], family="sd1")


def test_beside_replacements_that_all_agree_on_other_changes_are_added_up() -> None:
    both = sd1("replacement", seed=1, most=2)
    files = [File({**both.tensors, **sd1("lora", seed=seed, most=2).tensors}) for seed in (2, 3)]
    done = plan(files, [0.5, 0.25], family="sd1")
    assert all(torch.equal(done.plan.state_dict()[key], tensor) for key, tensor in both.tensors.items())
    lora = [File({key: t for key, t in file.tensors.items() if key not in both.tensors}) for file in files]
    wanted = summed(lora, [0.5, 0.25], "kohya", "sd1")
    for place, changes in made(done).changes.items():
        (change,) = (change for change in changes if change.kind == "lora")
        assert np.allclose(change.dense(dtype=torch.float64).flatten(1).numpy(), wanted[place], atol=1e-5)


def test_with_a_base_dora_is_the_plain_delta_that_it_makes() -> None:
    dora, other = flux(form="dora of rows", seed=1), flux(seed=2)
    network = family("flux1")[0].network("transformer")
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in network.shapes.items()}
    done = plan([dora, other], [0.6, 0.5], base=base, to="kohya")
    wanted = summed([other], [0.5], "kohya", "flux1")
    lines = aligned(dora.read("flux1"), family("flux1")[0].target("kohya"))
    for place, (change,) in lines.changes.items():
        weight = torch.cat([base[f"{piece.module}.weight"] for piece in place.span]).double()
        wanted[place] = wanted[place] + 0.6 * change.dense(weight, torch.float64).numpy()
    check(done, wanted)
    assert (
        refused(
            Unrepresentable, [dora, other], 0.6, 0.5, base={k: v for k, v in base.items() if "attn" not in k}
        ).code
        == "merge-kind"
    )


# --- what travels along ---------------------------------------------------------------------------


def with_embedding(file: File, value: float, name: str = "style") -> File:
    return File({**file.tensors, f"bundle_emb.{name}.string_to_param.*": torch.full((2, 3), value)})


def test_passengers_of_all_inputs_come_along() -> None:
    one, two = with_embedding(sd1(seed=1), 1.0), with_embedding(sd1(seed=2), 2.0, "other")
    done = plan([one, two], family="sd1")
    assert len(done.plan.passengers) == 2 and done.receipt.balances and done.receipt.carried == 2
    again = plan([one, with_embedding(sd1(seed=2), 1.0)], family="sd1")
    assert len(again.plan.passengers) == 1 and again.receipt.balances
    adapter = one.read("sd1")
    assert plan_merge([adapter, adapter]).receipt.balances


def test_two_passengers_of_one_name_are_refused_and_by_consent_the_first_stays() -> None:
    files = [with_embedding(sd1(seed=1), 1.0), with_embedding(sd1(seed=2), 2.0)]
    assert refused(Refused, files, family="sd1").code == "passengers"
    done = plan(files, family="sd1", allow={"passengers"})
    (kept,) = done.plan.passengers.values()
    assert float(kept[0, 0]) == 1.0 and done.receipt.balances and len(done.receipt.dropped) == 1


# --- faults ---------------------------------------------------------------------------------------


def test_adapters_of_different_base_models_are_refused_each_by_name(tmp_path) -> None:
    paths = [
        scratch(tmp_path, flux(seed=1), "a.safetensors"),
        scratch(tmp_path, sd1(seed=2), "b.safetensors"),
    ]
    with pytest.raises(Mismatch) as caught:
        plan_merge(paths)
    assert caught.value.code == "families" and caught.value.hint
    assert "`a.safetensors` is for FLUX.1" in caught.value.message
    assert "`b.safetensors` is for" in caught.value.message


def test_modules_of_different_sizes_are_refused_by_name() -> None:
    file = flux(seed=1, most=1)
    wider = {
        key: torch.cat([t, t]) if "lora_up" in key else t for key, t in flux(seed=2, most=1).tensors.items()
    }
    for method in ("linear", "svd", "ties"):
        error = refused(Mismatch, [file, File(wider)], method=method)
        assert error.code == "merge-shapes" and "lora_unet" in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_number_that_is_not_finite_is_refused_with_module_and_file(method, value) -> None:
    bad = flux(seed=2)
    key = next(key for key in bad.tensors if "lora_up" in key)
    bad.tensors[key][0, 0] = value
    error = refused(Refused, [flux(seed=1), bad], method=method)
    assert error.code == "nonfinite" and key.split(".")[0] in error.message and "`input 2`" in error.message


def test_by_consent_such_a_module_is_only_added_up_and_named() -> None:
    bad = flux(seed=2)
    key = next(key for key in bad.tensors if "lora_up" in key)
    bad.tensors[key][0, 0] = float("nan")
    done = plan([flux(seed=1), bad], method="svd", allow={"nonfinite"})
    assert done.damaged == (key.split(".")[0],) and len(done.reduction.ranks) == 3
    assert any("not finite" in text for text in merging_notes(done))
    assert len(done.plan.modules) == 4


def test_strengths_are_as_many_as_adapters_and_numbers() -> None:
    files = [flux(seed=1), flux(seed=2)]
    refused(UsageError, files, 1.0)
    refused(UsageError, files, 1.0, float("nan"))
    refused(UsageError, files, 0.0, 0.0)
    refused(UsageError, files, method="average")
    with pytest.raises(UsageError):
        plan_merge([])


def test_an_adapter_of_strength_0_adds_nothing_and_its_tensors_are_counted() -> None:
    files = [flux(seed=1), flux(seed=2)]
    done = plan(files, [1.0, 0.0])
    check(done, summed(files, [1.0, 0.0], "kohya", "flux1"))
    assert list(done.receipt.dropped.values()) == ["strength 0"] * 12


def test_adapters_that_cancel_leave_nothing_to_write() -> None:
    file = flux(seed=1)
    error = refused(Refused, [file, file], 1.0, -1.0, method="svd")
    assert error.code == "nothing-left"


def test_a_base_changed_by_its_configuration_is_refused() -> None:
    owner = family("flux1")[0]
    file = build("flux1", "peft", modules("flux1", "peft", "transformer", "lora"), seed=1)
    name = next(iter(file.sidecars))
    config = {**file.sidecars[name], "init_lora_weights": "pissa"}
    pissa = File(file.tensors, file.metadata, {name: config})
    assert owner.name == "flux1"
    assert refused(Unrepresentable, [flux(seed=2), pissa]).code == "config-needed"


def test_the_output_is_none_of_the_inputs_unless_forced(tmp_path) -> None:
    paths = [scratch(tmp_path, flux(seed=s), f"{s}.safetensors") for s in (1, 2)]
    options = MergeOptions(family="flux1")
    with pytest.raises(StoreError) as caught:
        merge(paths, None, paths[1], None, options)
    assert caught.value.code == "exists"
    wanted = summed([flux(seed=1), flux(seed=2)], [1.0, 1.0], "kohya", "flux1")
    check(merge(paths, None, paths[1], None, replace(options, force=True)), wanted)


# --- sources, blocks, provenance ------------------------------------------------------------------


def test_sources_are_paths_state_dicts_stores_and_adapters(tmp_path) -> None:
    files = [flux(seed=seed) for seed in (1, 2, 3, 4)]
    sources = [scratch(tmp_path, files[0]), files[1].tensors, files[2].store(), files[3].read("flux1")]
    done = plan_merge(sources, options=MergeOptions(family="flux1"))
    check(done, summed(files, [1.0] * 4, "kohya", "flux1"))
    assert [source.name for source in done.sources] == [
        "adapter.safetensors",
        "input 2",
        "input 3",
        "input 4",
    ]


def test_blocks_weigh_one_input_or_all() -> None:
    files = [flux("diffusers", seed=1), flux("diffusers", seed=2)]
    each = [deltas_of(file.read("flux1"), "diffusers") for file in files]
    done = plan(files, [1.0, 0.5], blocks=["*=0.5", "2:*.to_q=0,*.to_k=3"])
    # Of both everything is halved, and then of the second some modules are weighed as well.
    weights = {"to_q": 0.0, "to_k": 3.0}
    wanted = {
        place: 0.5 * each[0][place] + 0.5 * 0.5 * weights.get(place.span[0].module[-4:], 1.0) * each[1][place]
        for place in each[0]
    }
    check(done, wanted)
    assert refused(UsageError, files, blocks=["3:*=1"]).code == "strengths"
    assert refused(UsageError, files, blocks=["nowhere=1"]).code == "no-match"


def test_the_metadata_says_what_was_merged_and_how_and_nothing_of_folders(tmp_path) -> None:
    first = flux(seed=1)
    first.metadata["ss_network_dim"] = "4"
    paths = [scratch(tmp_path, first, "a.safetensors"), scratch(tmp_path, flux(seed=2), "b.safetensors")]
    options = MergeOptions(method="ties", density=0.3, family="flux1")
    done = merge(paths, [0.8, -0.3], tmp_path / "out.safetensors", RankRule(rank=6), options)
    metadata = output_metadata(done.plan)
    (step,) = json.loads(metadata["adapterkit"])
    assert step == {
        "operation": "merge",
        "method": "ties",
        "inputs": [{"name": "a.safetensors", "strength": 0.8}, {"name": "b.safetensors", "strength": -0.3}],
        "density": 0.3,
        "divide": "strengths",
        "rank": 6,
    }
    assert metadata["ss_network_dim"] == "6"
    again = merge(paths, [0.8, -0.3], tmp_path / "again.safetensors", RankRule(rank=6), options)
    assert again.conversion.files[0].read_bytes() == done.conversion.files[0].read_bytes()


def test_notes_tell_of_adapters_that_are_alike_or_cancel() -> None:
    file, other = flux(seed=1), flux(seed=2)
    assert any("nearly the same" in text for text in merging_notes(plan([file, file])))
    assert any("nearly cancel" in text for text in merging_notes(plan([file, file], [1.0, -0.9])))
    assert not list(merging_notes(plan([file, other])))


def test_progress_is_told(tmp_path) -> None:
    told = []
    plan_merge(
        [flux(seed=1).store()],
        options=MergeOptions(method="svd", family="flux1"),
        progress=lambda *step: told.append(step),
    )
    assert told[-1] == ("merging", 4, 4)
