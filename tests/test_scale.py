"""What multiplies a change: every rule about alpha, with where the number came from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from adapters import File, converted
from torch import Tensor, nn

from adapterkit import inspect
from adapterkit.adapter import read_adapter
from adapterkit.detect import explain
from adapterkit.errors import Conflict, Json, StoreError
from adapterkit.plan import Options
from adapterkit.scale import Scale, ScaleFrom
from adapterkit.specs.tuner_config import CONFIG_FILE, METADATA_KEY, ModuleScale, TunerConfig, config_fields

STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOTTED = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SIZE = 12

LORA = {"lora_up.weight": (SIZE, 4), "lora_down.weight": (4, SIZE)}
LOHA = {"hada_w1_a": (SIZE, 8), "hada_w1_b": (8, SIZE), "hada_w2_a": (SIZE, 8), "hada_w2_b": (8, SIZE)}
GLORA = {"a1.weight": (SIZE, 4), "a2.weight": (4, SIZE), "b1.weight": (SIZE, 4), "b2.weight": (4, SIZE)}
LOKR = {"lokr_w1": (3, 4), "lokr_w2": (4, 3)}


@dataclass(frozen=True)
class Case:
    """A module as a kohya file has it, and what multiplies its change."""

    shapes: Mapping[str, tuple[int, ...]]
    beside: Mapping[str, Tensor]
    value: float
    source: str
    alpha: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def number(value: float, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ()) -> Tensor:
    return torch.full(shape, value).to(dtype)


RS_LORA = {"ss_network_args": json.dumps({"algo": "glora", "rs_lora": "True"})}
NOT_RS_LORA = {"ss_network_args": json.dumps({"algo": "glora", "rs_lora": "False"})}

CASES: dict[str, Case] = {
    "alpha by the rank": Case(LORA, {"alpha": number(2)}, 0.5, "`.alpha`", 2),
    "no alpha": Case(LORA, {}, 1.0, "none given"),
    "alpha of one element": Case(LORA, {"alpha": number(2, shape=(1,))}, 0.5, "`.alpha`", 2),
    "alpha in half precision": Case(
        LORA, {"alpha": number(29.3, torch.float16)}, 29.296875 / 4, "`.alpha`", 29.296875
    ),
    # bfloat16 has eight bits: 29.3 is written 29.25.
    "alpha in bfloat16": Case(LORA, {"alpha": number(29.3, torch.bfloat16)}, 29.25 / 4, "`.alpha`", 29.25),
    "alpha as an integer": Case(LORA, {"alpha": number(8, torch.int64)}, 2.0, "`.alpha`", 8),
    "alpha of one element in half precision": Case(
        LORA, {"alpha": number(8, torch.float16, (1,))}, 2.0, "`.alpha`", 8
    ),
    "alpha below zero": Case(LORA, {"alpha": number(-2)}, -0.5, "`.alpha`", -2),
    "alpha of zero": Case(LORA, {"alpha": number(0)}, 0.0, "`.alpha`", 0),
    "alpha of zero that the trainer took for the rank": Case(
        LORA,
        {"alpha": number(0)},
        1.0,
        "`.alpha` 0, which the trainer takes for the rank",
        0,
        {"ss_network_alpha": "0"},
    ),
    "alpha of zero from a trainer that had another": Case(
        LORA, {"alpha": number(0)}, 0.0, "`.alpha`", 0, {"ss_network_alpha": "4"}
    ),
    "arguments nested too deep to be read": Case(
        GLORA, {"alpha": number(2)}, 0.5, "`.alpha`", 2, {"ss_network_args": "[" * 100_000}
    ),
    "arguments with a number too long to be read": Case(
        GLORA, {"alpha": number(2)}, 0.5, "`.alpha`", 2, {"ss_network_args": "9" * 5000}
    ),
    "the rank of a core's down": Case(
        {
            "lora_up.weight": (SIZE, 4, 1, 1),
            "lora_mid.weight": (4, 2, 3, 3),
            "lora_down.weight": (2, SIZE, 1, 1),
        },
        {"alpha": number(1)},
        0.5,
        "`.alpha`",
        1,
    ),
    "a scale of its own": Case(LORA, {"scale": number(0.7)}, number(0.7).item(), "`.scale`"),
    "a scale of its own over alpha": Case(LORA, {"scale": number(3), "alpha": number(2)}, 3.0, "`.scale`"),
    "a scalar times alpha": Case(
        LORA, {"scalar": number(0.25), "alpha": number(2)}, 0.125, "`.alpha`, times `.scalar`", 2
    ),
    "a scalar without alpha": Case(LORA, {"scalar": number(0.25)}, 0.25, "none given, times `.scalar`"),
    "loha by the rank of its first half": Case(LOHA, {"alpha": number(2)}, 0.25, "`.alpha`", 2),
    "lokr by the rank of its second factor": Case(
        {"lokr_w1": (3, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 3)},
        {"alpha": number(1)},
        0.5,
        "`.alpha`",
        1,
    ),
    "lokr by the rank of its first factor": Case(
        {"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 4), "lokr_w2": (4, 3)},
        {"alpha": number(1)},
        0.5,
        "`.alpha`",
        1,
    ),
    "lokr without ranks": Case(
        LOKR, {"alpha": number(1e10)}, 1.0, "`.alpha` does not apply to undecomposed factors", 1e10
    ),
    "glora by its rank": Case(GLORA, {"alpha": number(2)}, 0.5, "`.alpha`", 2),
    # Of all its kinds this is the one for which LyCORIS stores alpha as it was given.
    "glora by the root of its rank": Case(GLORA, {"alpha": number(2)}, 1.0, "`.alpha`", 2, RS_LORA),
    "glora that says it is not so": Case(GLORA, {"alpha": number(2)}, 0.5, "`.alpha`", 2, NOT_RS_LORA),
    "lora whose alpha holds the root already": Case(
        LORA, {"alpha": number(2 * math.sqrt(4))}, 1.0, "`.alpha`", 4, RS_LORA
    ),
    "a whole difference": Case({"diff": (SIZE, SIZE)}, {}, 1.0, ""),
    "a whole difference beside an alpha": Case({"diff": (SIZE, SIZE)}, {"alpha": number(0.5)}, 1.0, ""),
    "a rotation's alpha is its limit": Case({"oft_blocks": (3, 4, 4)}, {"alpha": number(0.5)}, 1.0, ""),
}


def kohya(case: Case) -> File:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{STEM}.{role}": torch.randn(shape, generator=generator) for role, shape in case.shapes.items()
    }
    return File(tensors | {f"{STEM}.{role}": t for role, t in case.beside.items()}, dict(case.metadata))


def only_scale(file: File, scale_from: ScaleFrom | None = None, family_name: str | None = "sd1") -> Scale:
    store = file.store()
    adapter = read_adapter(store, explain(store, family_name=family_name), scale_from=scale_from)
    (scale,) = adapter.scales.values()
    (change,) = next(iter(adapter.changes.values()))
    assert getattr(change, "scale", scale.value) == scale.value
    return scale


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.source])
def test_the_scale_and_where_it_came_from(name: str) -> None:
    case = CASES[name]
    scale = only_scale(kohya(case))
    assert scale.value == pytest.approx(case.value, rel=1e-12)
    assert (scale.alpha, scale.source) == (case.alpha, case.source)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.source])
def test_what_has_no_scale_is_not_scaled(name: str) -> None:
    adapter = kohya(CASES[name]).read("sd1")
    (change,) = next(iter(adapter.changes.values()))
    assert not adapter.scales
    assert getattr(change, "scale", 1.0) == 1.0
    assert getattr(change, "constraint", 0.5) == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["alpha", "scale"])
def test_a_scale_that_is_no_number_is_an_error(value: float, role: str) -> None:
    with pytest.raises(StoreError) as caught:
        kohya(Case(LORA, {role: number(value)}, 0, "")).read("sd1")
    assert (caught.value.code, f"`{STEM}.{role}`" in caught.value.message) == ("bad-alpha", True)


@pytest.mark.parametrize(
    "name", ["alpha in bfloat16", "a scale of its own", "a scalar times alpha", "alpha of zero"]
)
@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers", "peft", "diffusers-2023"])
def test_no_scale_is_lost_or_applied_twice_on_the_way(name: str, to: str) -> None:
    """alpha and the factors are read anew; together they make the same delta."""
    before = kohya(CASES[name])
    up, down = (
        before.tensors[f"{STEM}.lora_up.weight"].double(),
        before.tensors[f"{STEM}.lora_down.weight"].double(),
    )
    after = converted(before, "sd1", to)
    (change,) = next(iter(after.read("sd1").changes.values()))
    expected = CASES[name].value * (up @ down)
    error = float((change.dense(dtype=torch.float64) - expected).norm())
    assert error <= 1e-7 * float(expected.norm())


# --- configurations -------------------------------------------------------------------------------


def peft_keys(rank: int, path: str = DOTTED, front: str = "base_model.model.") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        f"{front}{path}.lora_A.weight": torch.randn(rank, SIZE, generator=generator),
        f"{front}{path}.lora_B.weight": torch.randn(SIZE, rank, generator=generator),
    }


def diffusers_file(config: Mapping[str, Json], rank: int = 4, **beside: Tensor) -> File:
    flat = {f"unet.{key}": value for key, value in config.items()}
    tensors = peft_keys(rank, front="unet.") | {f"unet.{DOTTED}.{role}": t for role, t in beside.items()}
    return File(tensors, {"format": "pt", METADATA_KEY: json.dumps(flat)})


CONFIGS: dict[str, tuple[Mapping[str, Json], int, float]] = {
    "alpha by the rank": ({"r": 4, "lora_alpha": 8}, 4, 2.0),
    "alpha by the root of the rank": ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4, 4.0),
    "not by the root": ({"r": 4, "lora_alpha": 8, "use_rslora": False}, 4, 2.0),
    "a pattern of ranks": ({"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 16}}, 16, 0.5),
    "a pattern of alphas": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 4, 0.5),
    "both, by the root": (
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"to_q": 16},
            "alpha_pattern": {"to_q": 2},
            "use_rslora": True,
        },
        16,
        0.5,
    ),
    "the first pattern that matches": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 16, "attn1.to_q": 32}},
        4,
        4.0,
    ),
    "the first, in the other order": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 32, "to_q": 16}},
        4,
        8.0,
    ),
    "an anchor at the name's beginning": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"^mid_block.*to_q": 4}},
        4,
        1.0,
    ),
    "an anchor that is not at its beginning": (
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"^attn1.to_q": 4}},
        4,
        2.0,
    ),
    "whole components of a name only": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"o_q": 4}}, 4, 2.0),
    "the end of a name only": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1": 4}}, 4, 2.0),
    "a choice of names": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k|to_q": 4}}, 4, 1.0),
    "the ranks that are left": (
        {"r": 16, "lora_alpha": 8, "rank_pattern": {"to_q": [True, True, False, True, True]}},
        4,
        2.0,
    ),
    "no alpha": ({"r": 4}, 4, 1.0),
    "no patterns": ({"r": 4, "lora_alpha": 6, "alpha_pattern": None, "rank_pattern": None}, 4, 1.5),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("home", [CONFIG_FILE, METADATA_KEY])
def test_a_configuration_says_the_scale_as_peft_reads_it(name: str, home: str) -> None:
    config, rank, value = CONFIGS[name]
    if home == METADATA_KEY:
        scale = only_scale(diffusers_file(config, rank))
    else:
        sidecars: dict[str, Json] = {CONFIG_FILE: dict(config)}
        scale = only_scale(File(peft_keys(rank), {"format": "pt"}, sidecars), family_name="sd1")
    assert scale.value == value
    assert scale.source == ("none given" if name == "no alpha" else home)


@pytest.mark.parametrize("sources", ["alpha", "config"])
def test_two_scales_that_differ_are_a_conflict_until_one_is_chosen(sources: ScaleFrom) -> None:
    file = diffusers_file({"r": 4, "lora_alpha": 8}, alpha=number(2))
    with pytest.raises(Conflict) as caught:
        only_scale(file)
    assert caught.value.code == "scale-conflict"
    assert "--scale-from" in caught.value.hint
    assert caught.value.details == {"module": f"unet.{DOTTED}", "alpha": 0.5, "config": 2.0}
    assert all(text in caught.value.message for text in ("0.5", "`.alpha`", "2", METADATA_KEY))
    assert only_scale(file, sources).value == (0.5 if sources == "alpha" else 2.0)


def test_two_scales_that_agree_are_one() -> None:
    assert only_scale(diffusers_file({"r": 4, "lora_alpha": 8}, alpha=number(8))).source == "`.alpha`"
    rounded = diffusers_file({"r": 4, "lora_alpha": 29.3}, alpha=number(29.3, torch.bfloat16))
    assert only_scale(rounded).value == 29.25 / 4


def test_choosing_a_source_that_is_not_there_leaves_the_other() -> None:
    assert only_scale(diffusers_file({"r": 4, "lora_alpha": 8}), "alpha").value == 2.0
    assert only_scale(kohya(CASES["alpha by the rank"]), "config").value == 0.5


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"(": 1}}']
)
def test_a_configuration_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(StoreError) as caught:
        File(peft_keys(4, front="unet."), {METADATA_KEY: text}).read("sd1")
    assert caught.value.code == "bad-config"


def test_each_component_has_a_configuration_of_its_own() -> None:
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    flat = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 1}
    tensors = peft_keys(4, front="unet.") | peft_keys(4, text, "text_encoder.")
    adapter = File(tensors, {METADATA_KEY: json.dumps(flat)}).read("sd1")
    assert {place.component: scale.value for place, scale in adapter.scales.items()} == {
        "unet": 2.0,
        "text_encoder": 0.25,
    }


def test_inspecting_shows_the_scale_that_loading_takes_for_experts() -> None:
    name = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(8 * 4, 64),
        f"{name}.lora_B.weight": torch.randn(32, 8 * 4),
    }
    config: dict[str, Json] = {"r": 4, "lora_alpha": 8, "target_parameters": ["mlp.experts.gate_up_proj"]}
    store = File(tensors, {}, {CONFIG_FILE: config}).store()
    (loaded,) = read_adapter(store).scales.values()
    (shown,) = inspect(store).scales
    assert loaded.value == shown.value == 2.0


def test_peft_applies_alpha_where_lycoris_does_not() -> None:
    """An undecomposed LoKr: 1 in LyCORIS, alpha / r in PEFT, and the same change after a conversion."""
    front = f"base_model.model.{DOTTED}"
    tensors = {f"{front}.lokr_w1": torch.ones(3, 4), f"{front}.lokr_w2": torch.ones(4, 3)}
    file = File(tensors, {"format": "pt"}, {CONFIG_FILE: {"peft_type": "LOKR", "r": 8, "alpha": 2}})
    assert only_scale(file).value == 0.25
    after = converted(file, "sd1", "kohya")
    assert only_scale(after).value == 1.0
    assert torch.equal(after.tensors[f"{STEM}.lokr_w1"], torch.full((3, 4), 0.25))


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_the_bias_inside_a_layer_has_the_layers_scale(rank_stabilised: bool) -> None:
    """PEFT multiplies the bias of B by the scale; everyone else's bias difference stands as it is."""
    config = {"r": 4, "lora_alpha": 8, "lora_bias": True, "use_rslora": rank_stabilised}
    file = diffusers_file(config)
    bias = torch.arange(SIZE, dtype=torch.float32)
    file.tensors[f"unet.{DOTTED}.lora_B.bias"] = bias
    expected = bias * (4.0 if rank_stabilised else 2.0)
    after = converted(file, "sd1", "kohya")
    assert torch.equal(after.tensors[f"{STEM}.diff_b"], expected)
    again = converted(after, "sd1", "diffusers")
    assert torch.equal(again.tensors[f"unet.{DOTTED}.lora_B.bias"], bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_numbers_are_not_flushed_when_a_scale_is_folded(dtype: torch.dtype) -> None:
    """up of a barely trained adapter is near 1e-6; halves have nothing below 6e-8."""
    up = torch.full((SIZE, 4), 2.0**-20).to(dtype)
    case = File(
        {
            f"{STEM}.lora_up.weight": up,
            f"{STEM}.lora_down.weight": torch.ones(4, SIZE, dtype=dtype),
            f"{STEM}.alpha": number(4 * 2.0**-7),
        }
    )
    after = converted(case, "sd1", "diffusers-2023")
    (change,) = next(iter(after.read("sd1").changes.values()))
    assert torch.equal(change.dense(), torch.full((SIZE, SIZE), 4 * 2.0**-27))


def test_folding_on_request_leaves_a_scale_of_one() -> None:
    before = kohya(CASES["alpha by the rank"])
    after = converted(before, "sd1", "kohya", Options(fold=True))
    assert float(after.tensors[f"{STEM}.alpha"]) == 4.0
    assert torch.equal(
        after.tensors[f"{STEM}.lora_up.weight"], before.tensors[f"{STEM}.lora_up.weight"] * 0.5
    )


# --- against PEFT itself --------------------------------------------------------------------------

PATHS = (
    "proj",
    "block.0.attn.to_q",
    "block.0.attn.to_k",
    "block.1.attn.to_q",
    "block.1.proj",
    "block.10.attn.to_q",
)
PATTERNS: tuple[dict[str, int], ...] = (
    {},
    {"to_q": 16},
    {"^proj": 16},
    {"proj": 16},
    {"attn.to_q": 16, "to_q": 2},
    {"block.1.attn.to_q": 16},
    {r"block\.1\.attn\.to_q": 16, "to_.": 2},
    {".*0.attn.to_q": 16},
    {"^block.*to_k": 2, "block": 1},
    {"o_q": 16, "0.attn": 2},
)


def _model() -> nn.Module:
    root = nn.Module()
    for path in PATHS:
        parent = root
        *parents, name = path.split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name, nn.Linear(20, 20))
    return root


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
@pytest.mark.parametrize("number", range(2 * len(PATTERNS)))
def test_every_module_has_the_rank_and_scale_that_peft_gives_it(number: int) -> None:
    ranks, alphas = PATTERNS[number % len(PATTERNS)], PATTERNS[3 * number % len(PATTERNS)]
    rank_stabilised = number < len(PATTERNS)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(PATHS),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=rank_stabilised,
    )
    model = peft.get_peft_model(_model(), config).base_model.model
    ours = TunerConfig({key: value for key, value in config.to_dict().items() if not callable(value)})
    for path in PATHS:
        layer = model.get_submodule(path)
        rank = layer.r["default"]
        assert ours.rank(path) == rank
        assert ours.scale(path, rank) == layer.scaling["default"]


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(8))
def test_peft_gives_every_module_the_rank_and_scale_that_we_wrote(seed: int) -> None:
    peft = pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(seed)
    choices = torch.randint(0, 3, (len(PATHS), 2), generator=generator).tolist()
    scales = [
        ModuleScale(path, (2, 4, 8)[a], (0.5, 1.0, 29.3 / 8)[b])
        for path, (a, b) in zip(PATHS, choices, strict=True)
    ]
    fields = config_fields(scales)
    model = peft.get_peft_model(_model(), peft.LoraConfig(**fields)).base_model.model
    for wanted in scales:
        layer = model.get_submodule(wanted.module)
        assert layer.r["default"] == wanted.rank
        assert layer.scaling["default"] == pytest.approx(wanted.scale, rel=1e-15)
