"""PEFT as it is installed: what it saves we read as it applies it, what we write it loads."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from oracle_law import as_is, changes_of, check_deltas, check_same, randomise, relative, silence, weights
from torch import Tensor, nn

from adapterkit.errors import Unrepresentable
from adapterkit.operations.convert import ConvertOptions, convert
from adapterkit.operations.convert import save as save_adapter
from adapterkit.operations.slice import SliceOptions
from adapterkit.operations.slice import slice as slice_adapter
from adapterkit.operations.sources import load
from adapterkit.peft_factors import divided
from adapterkit.specs.tuner_config import TunerConfig
from adapterkit.stores import open_store

pytestmark = pytest.mark.oracle

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Case:
    """A model and the configuration of an adapter for it."""

    model: str
    config: Callable[[], Any]


def lora(model: str = "llama", **options: Any) -> Case:
    return Case(
        model, lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": ATTENTION, **options})
    )


def of(kind: str, model: str = "llama", **options: Any) -> Case:
    return Case(model, lambda: getattr(peft, kind)(**{"target_modules": ATTENTION, **options}))


FIRST_LAYER = "layers.0.self_attn.q_proj"
CASES = {
    "lora": lora(target_modules=["q_proj", "down_proj", "lm_head"]),
    "rslora": lora(use_rslora=True, rank_pattern={"q_proj": 2}),
    "patterns": lora(
        rank_pattern={FIRST_LAYER: 2, "q_proj": 3},
        alpha_pattern={r"^model\.layers\.\d\.self_attn\.v_proj": 7, FIRST_LAYER: 0.5},
    ),
    "layers": lora(layers_to_transform=[1], layers_pattern="layers"),
    "dora": lora(use_dora=True),
    "bias inside": lora("bert", target_modules=["query", "classifier"], lora_bias=True),
    "all biases": lora("bert", target_modules=["query"], bias="all"),
    "biases beside": lora("bert", target_modules=["query"], bias="lora_only"),
    "a head": lora("bert", target_modules=["query"], task_type="SEQ_CLS"),
    "whole modules": lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "an embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "an embedding, dora": lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "tokens beside": lora(target_modules=["q_proj"], trainable_token_indices=[3, 5, 7]),
    "tokens beside, by name": lora(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [2]}
    ),
    "tokens beside, tied": lora("tied_llama", target_modules=["q_proj"], trainable_token_indices=[3, 5, 7]),
    "tokens": Case("llama", lambda: peft.TrainableTokensConfig(token_indices=[3, 5, 7])),
    "transposed layers": lora("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "transposed layers, dora": lora("gpt2", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
    "encoder and decoder": lora("t5", target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM"),
    "a mixture": lora("mixtral", target_modules=["q_proj", "gate"]),
    "loha": of("LoHaConfig", r=3, alpha=2, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 5}),
    "lokr": of("LoKrConfig", r=2, alpha=3),
    "lokr, factor": of("LoKrConfig", r=2, alpha=3, decompose_factor=4, target_modules=["down_proj"]),
    "lokr, both": of("LoKrConfig", r=2, alpha=3, decompose_both=True, target_modules=["q_proj", "down_proj"]),
    "lokr, whole": of("LoKrConfig", r=32, alpha=3),
    "ia3": of(
        "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3, transposed layers": of(
        "IA3Config",
        "gpt2",
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
    ),
    "oft": of("OFTConfig", oft_block_size=8),
    "oft, solved": of("OFTConfig", oft_block_size=8, use_cayley_neumann=False),
    "oft, shared": of("OFTConfig", oft_block_size=8, block_share=True, num_cayley_neumann_terms=3),
    "oft, embedding": of("OFTConfig", oft_block_size=8, target_modules=["embed_tokens", "q_proj"]),
    "boft": of("BOFTConfig", boft_block_size=8),
    "adalora": of("AdaLoraConfig", init_r=5, target_r=3, lora_alpha=3, total_step=10),
    "vera": of("VeraConfig", r=4, target_modules=["q_proj", "k_proj"], save_projection=True),
}


@cache
def model(name: str) -> nn.Module:
    """The model of a name, with biases that are not zero."""
    built = models.llama(tied=True) if name == "tied_llama" else models.MODELS[name]()
    randomise(built, seed=7, deviation=0.3, chosen=lambda name: name.endswith("bias"))
    return built


def adapted(case: Case, seed: int = 1) -> Any:
    """The case's model with its adapter, every weight of which is random."""
    wrapped = peft.get_peft_model(copy.deepcopy(model(case.model)), case.config())
    randomise(wrapped, seed)
    shared = [name for name, parameter in wrapped.named_parameters() if "vera_" in name]
    randomise(wrapped, seed + 1, chosen=lambda name: name in shared)
    return wrapped


def save(wrapped: Any, folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        # PEFT says so when it also saves the layers of an embedding that it adapts.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        # PEFT takes the bias of the up factor for a factor that lost an axis.
        warnings.filterwarnings("ignore", message=".*have invalid shape")
        wrapped.save_pretrained(str(folder), **options)


def merged(wrapped: Any) -> dict[str, Tensor]:
    return weights(wrapped.merge_and_unload())


def transposed(name: str, weight: Tensor) -> Tensor:
    """GPT-2 keeps the weights of its layers, not of its embeddings, as (in, out)."""
    return weight.T if ".h." in name and weight.ndim == 2 else weight


def turn_of(case: Case) -> Callable[[str, Tensor], Tensor]:
    return transposed if case.model == "gpt2" else as_is


def leave_out_biases(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """PEFT's IA³ scales a layer's output and with it the bias, which a change of the weight does not say."""
    for name in [name for name in before if name.endswith(".bias")]:
        del before[name], after[name]


IN_A_PICKLE = ("lora", "all biases", "tokens", "lokr, both")


@pytest.mark.parametrize(
    "name, suffix", [*((name, "safetensors") for name in CASES), *((name, "bin") for name in IN_A_PICKLE)]
)
def test_what_peft_saves_changes_the_weights_as_it_merges_them(
    name: str, suffix: str, tmp_path: Path
) -> None:
    """Every parameter of the model, those that stay as they are included."""
    case = CASES[name]
    wrapped = adapted(case)
    save(wrapped, tmp_path, safe_serialization=suffix == "safetensors")
    assert (tmp_path / f"adapter_model.{suffix}").exists()
    adapter = load(tmp_path)
    before, after = weights(model(case.model)), merged(wrapped)
    if name.startswith("ia3"):
        leave_out_biases(before, after)
    check_deltas(adapter, before, after, component="model", turn=turn_of(case))


def loaded(case: Case, folder: Path) -> dict[str, Tensor]:
    """The model's weights with the adapter in `folder` merged; PEFT has nothing to say about it."""
    with silence():
        return merged(applied(case, folder))


def applied(case: Case, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(model(case.model)), str(folder))


def check_loads(case: Case, folder: Path, expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    check_same(loaded(case, folder), expected, weights(model(case.model)), tolerance)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_is_not_changed_stays_as_it_is(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    wrapped = adapted(case)
    save(wrapped, tmp_path / "theirs")
    convert(tmp_path / "theirs", "peft", tmp_path / "ours")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        theirs, ours = (_content(tmp_path / side / file) for side in ("theirs", "ours"))
        assert ours == theirs, file


def _content(path: Path) -> object:
    """JSON, or the bytes of each tensor by name."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with open_store(path) as store:
        return {
            name: (info.dtype, info.shape, bytes(store.read(name))) for name, info in store.tensors.items()
        }


# What only a configuration of PEFT's own says, so that none can be written without the old one.
NEEDS_ITS_OWN = ("tokens", "adalora", "vera")


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(NEEDS_ITS_OWN)])
def test_a_configuration_made_from_the_tensors_alone_builds_the_same_modules(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    wrapped = adapted(case)
    save(wrapped, tmp_path / "theirs")
    adapter = load(tmp_path / "theirs")
    (config,) = adapter.tuners.values()
    kept = {key: value for key, value in config.values.items() if key in {"fan_in_fan_out", "task_type"}}
    save_adapter(replace(adapter, tuners={"": TunerConfig(kept)}), "peft", tmp_path / "ours")
    check_loads(case, tmp_path / "ours", merged(wrapped))


@pytest.mark.parametrize(
    "name", ["rslora", "patterns", "dora", "an embedding", "tokens beside", "loha", "lokr"]
)
def test_a_scale_folded_into_the_factors_changes_the_weights_alike(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    wrapped = adapted(case)
    save(wrapped, tmp_path / "theirs")
    convert(tmp_path / "theirs", "peft", tmp_path / "ours", ConvertOptions(fold=True))
    check_loads(case, tmp_path / "ours", merged(wrapped))


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("loha", "lokr", "adalora", "vera"))])
def test_what_is_expanded_to_lora_changes_the_weights_alike(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    wrapped = adapted(case)
    save(wrapped, tmp_path / "theirs")
    options = ConvertOptions(as_lora=True, allow=frozenset({"passengers"}))
    convert(tmp_path / "theirs", "peft", tmp_path / "ours", options)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    check_loads(case, tmp_path / "ours", merged(wrapped), tolerance=5e-6)


def test_lora_of_stacked_experts_is_each_experts_own(tmp_path: Path) -> None:
    """PEFT nests a layer per parameter; the innermost is the first parameter's."""
    names = {"experts.base_layer": "gate_up_proj", "experts": "down_proj"}
    case = lora("mixtral", target_parameters=[f"mlp.experts.{name}" for name in names.values()])
    wrapped = adapted(case)
    save(wrapped, tmp_path / "theirs")
    adapter = load(tmp_path / "theirs")
    before, after = weights(model("mixtral")), merged(wrapped)
    checked = 0
    for name, (change,) in changes_of(adapter, "model").items():
        owner, _, layer = name.removesuffix(".weight").rpartition(".mlp.")
        if layer in names:
            parameter = f"{owner}.mlp.experts.{names[layer]}"
            delta = after[parameter] - before[parameter]
            assert change.kind == "experts" and relative(change.dense(before[parameter]), delta) < 2e-6
            checked += 1
    assert checked == 4
    convert(tmp_path / "theirs", "peft", tmp_path / "ours")
    assert _content(tmp_path / "ours" / "adapter_config.json") == _content(
        tmp_path / "theirs" / "adapter_config.json"
    )
    check_loads(case, tmp_path / "ours", after)


def test_a_pruned_adalora_keeps_the_divisor_of_the_rank_it_began_with(tmp_path: Path) -> None:
    case = Case(
        "llama",
        lambda: peft.AdaLoraConfig(
            init_r=5,
            target_r=2,
            lora_alpha=3,
            target_modules=ATTENTION,
            tinit=0,
            tfinal=1,
            deltaT=1,
            total_step=4,
        ),
    )
    wrapped = adapted(case)
    tokens = torch.arange(8).reshape(1, 8)
    for step in range(4):
        wrapped(tokens, labels=tokens).loss.backward()
        wrapped.base_model.update_and_allocate(step)
    save(wrapped, tmp_path / "theirs")
    adapter = load(tmp_path / "theirs")
    ranks = [change.rank or 0 for (change,) in changes_of(adapter, "model").values()]
    assert min(ranks) < 5
    with warnings.catch_warnings():
        # PEFT takes its own masks for ranks of modules that are not there.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys")
        after = merged(applied(case, tmp_path / "theirs"))
    check_deltas(adapter, weights(model("llama")), after, component="model")
    convert(tmp_path / "theirs", "peft", tmp_path / "ours", ConvertOptions(as_lora=True))
    check_loads(case, tmp_path / "ours", after)


@pytest.mark.parametrize("name", ["adalora", "vera", "tokens"])
def test_what_only_its_own_configuration_says_is_not_made_up(name: str, tmp_path: Path) -> None:
    save(adapted(CASES[name]), tmp_path / "theirs")
    adapter = load(tmp_path / "theirs")
    with pytest.raises(Unrepresentable) as refused:
        save_adapter(replace(adapter, tuners={}), "peft", tmp_path / "ours")
    assert refused.value.code == "config-needed"


def test_the_scale_of_an_adalora_is_not_folded(tmp_path: Path) -> None:
    save(adapted(CASES["adalora"]), tmp_path / "theirs")
    with pytest.raises(Unrepresentable):
        convert(tmp_path / "theirs", "peft", tmp_path / "ours", ConvertOptions(fold=True))


def test_a_classifier_whose_head_is_left_out_loads_without_it(tmp_path: Path) -> None:
    """PEFT replaces the head of such a task on loading and fails on a file that has none."""
    case = CASES["a head"]
    save(adapted(case), tmp_path / "theirs")
    slice_adapter(tmp_path / "theirs", tmp_path / "ours", SliceOptions(drop=("classifier",)))
    found, before = loaded(case, tmp_path / "ours"), weights(model("bert"))
    whole = loaded(case, tmp_path / "theirs")
    for name, weight in found.items():
        wanted = before if name.startswith("classifier") else whole
        assert torch.equal(weight, wanted[name]), name
    assert any(not torch.equal(whole[name], found[name]) for name in found)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_base_peft_changes_is_not_parted_from_its_configuration(
    start: str, tmp_path: Path
) -> None:
    """PEFT takes the initial product off the base on loading: elsewhere it would be added twice."""
    case = lora(init_lora_weights=start, lora_alpha=3)
    save(adapted(case), tmp_path / "theirs")
    convert(tmp_path / "theirs", "peft", tmp_path / "kept")
    with pytest.raises(Unrepresentable) as refused:
        convert(
            tmp_path / "theirs", "peft", tmp_path / "ours", ConvertOptions(fold=True, family="transformers")
        )
    assert refused.value.code == "config-needed"


def test_a_size_is_divided_as_peft_divides_it() -> None:
    from peft.tuners.lokr.layer import factorization

    sizes = [*range(1, 130), 320, 640, 768, 1280, 3072, 9216, 21504]
    for factor in (-1, *range(1, 20)):
        assert [divided(size, factor) for size in sizes] == [factorization(size, factor) for size in sizes]
