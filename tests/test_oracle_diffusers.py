"""diffusers as it is installed: what it saves we read as it applies it, what we write it loads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import models
import oracle_kohya
import pytest
import torch
from oracle_kohya import ALPHAS, FILES, Trained, canonical, train
from oracle_law import changes_of, check_deltas, check_same, randomise, relative, silence, weights
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkit.compare import differences
from adapterkit.errors import Unrepresentable
from adapterkit.operations.convert import ConvertOptions, convert
from adapterkit.operations.sources import load

pytestmark = pytest.mark.oracle

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

FAMILIES = ("sd1", "sdxl", "flux", "sd3")
COMPONENTS = {
    "sd1": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
}


@cache
def pipeline(family: str) -> Any:
    return getattr(models, f"{family}_pipeline")()


def merged(component: nn.Module) -> dict[str, Tensor]:
    """The component's weights with its adapter merged, by their names without one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = copy.deepcopy(component)
    for module in list(own.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in weights(own).items()
        if "lora_" not in name
    }


@contextmanager
def with_adapter(family: str, folder: Path, file: str) -> Iterator[Any]:
    """The family's pipeline with a file loaded, without a word of warning, and unloaded again."""
    pipe = pipeline(family)
    try:
        with silence(but="No LoRA keys associated to CLIP"):
            pipe.load_lora_weights(str(folder), weight_name=file)
        yield pipe
    finally:
        pipe.unload_lora_weights()


def check_loads(family: str, path: Path, trained: Trained) -> None:
    """Every weight that the file was made for, and no other, is what it asks for."""
    with with_adapter(family, path.parent, path.name) as pipe:
        after = {name: merged(getattr(pipe, name)) for name in COMPONENTS[family]}
    for component in COMPONENTS[family]:
        check_component(family, component, after[component], trained)


def check_component(family: str, component: str, after: dict[str, Tensor], trained: Trained) -> None:
    model = getattr(pipeline(family), component)
    changed = dict(canonical(model, after))
    for name, before in canonical(model, weights(model)):
        expected = trained.weights.get(f"{component}:{name}", before)
        error = relative(changed[name] - before, expected - before)
        assert error <= 2e-6, (component, name, error)


def denoiser_only(names: oracle_kohya.Names) -> oracle_kohya.Names:
    return {name: modules for name, modules in names.items() if "text_encoder" not in modules[0]}


def written(
    family: str, trained: Trained, folder: Path, to: str, options: ConvertOptions | None = None
) -> Path:
    """The file in another format. Models of small width tell no family by their shapes."""
    save_file(trained.tensors, folder / "kohya.safetensors")
    path = folder / "written.safetensors"
    convert(
        folder / "kohya.safetensors", to, path, replace(options or ConvertOptions(), family=NAMES[family])
    )
    return path


NAMES = {"sd1": "sd1", "sdxl": "sdxl", "flux": "flux1", "sd3": "SD 3 medium"}


WRITTEN = [
    *((family, dora, False) for family in FAMILIES for dora in (False, True)),
    *(("sd1", False, True), ("flux", False, True), ("flux", True, True)),
]


@pytest.mark.parametrize("family, dora, fold", WRITTEN)
def test_a_kohya_file_written_for_diffusers_does_what_its_tensors_say(
    family: str, dora: bool, fold: bool, tmp_path: Path
) -> None:
    """Ranks and alphas differ, fused weights are cut, halves swapped.

    transformers 5.24 reads no magnitudes, not even those that diffusers saves of its text encoders.
    """
    names = denoiser_only(FILES[family]) if dora else FILES[family]
    trained = train(pipeline(family), names, dora=dora)
    path = written(family, trained, tmp_path, "diffusers", ConvertOptions(fold=fold))
    check_loads(family, path, trained)


DENOISER = {
    "sd1": ("to_q", "to_out.0", "ff.net.2", "proj_in", "conv1"),
    "sdxl": ("to_k", "ff.net.0.proj", "proj_out", "conv_shortcut"),
    "flux": ("to_q", "add_k_proj", "proj_mlp", "proj_out", "norm_out.linear", "norm1.linear"),
    "sd3": ("to_q", "add_v_proj", "to_out.0", "norm1_context.linear", "norm_out.linear"),
}
ENCODER = ("q_proj", "out_proj", "fc1")
SAVED: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 7, "proj_(in|out)": 0.5}},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("to", ["diffusers", "ai-toolkit"])
def test_the_change_of_a_bias_lies_in_the_up_factor_less_its_scale(to: str, tmp_path: Path) -> None:
    """kohya's stands beside the factors and is not scaled; PEFT's is, and every module has one."""
    names = {name: modules for name, modules in FILES["flux"].items() if "layer_linear" not in name}
    trained = train(pipeline("flux"), names, biases=True)
    check_loads("flux", written("flux", trained, tmp_path, to), trained)


def saved(family: str, options: dict[str, Any], folder: Path, *, metadata: bool = True) -> dict[str, Any]:
    """Adapters of all components saved by the pipeline; returns the adapted components."""
    adapted, layers = {}, {}
    for seed, component in enumerate(COMPONENTS[family]):
        is_text = component.startswith("text")
        config = peft.LoraConfig(
            r=4,
            lora_alpha=3 if metadata else 4,
            target_modules=list(ENCODER if is_text else DENOISER[family]),
            **({} if is_text and "rank_pattern" in options else options),
        )
        own = copy.deepcopy(getattr(pipeline(family), component)).requires_grad_(False)
        peft.inject_adapter_in_model(config, own)
        randomise(own, seed + 1)
        adapted[component] = own
        layers[f"{component}_lora_layers"] = peft.get_peft_model_state_dict(own)
        if metadata:
            layers[f"{component}_lora_adapter_metadata"] = config.to_dict()
    type(pipeline(family)).save_lora_weights(str(folder), **layers)
    return adapted


def check_reads(family: str, adapted: dict[str, Any], folder: Path) -> None:
    adapter = load(folder, family=NAMES[family])
    for component, model in adapted.items():
        before = dict(canonical(model, weights(getattr(pipeline(family), component))))
        check_deltas(adapter, before, dict(canonical(model, merged(model))), component=component)


# PEFT takes the bias of the up factor for a factor that lost an axis.
@pytest.mark.filterwarnings("ignore:.*have invalid shape")
@pytest.mark.parametrize(
    "family, name",
    [
        *(("sd1", name) for name in ("lora", "rslora", "patterns", "dora")),
        *(("flux", name) for name in ("lora", "patterns", "dora", "bias")),
        *(("sdxl", "lora"), ("sd3", "lora")),
    ],
)
def test_what_diffusers_saves_changes_the_weights_as_it_applies_it(
    family: str, name: str, tmp_path: Path
) -> None:
    check_reads(family, saved(family, SAVED[name], tmp_path), tmp_path)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_without_metadata_the_scale_is_one(family: str, tmp_path: Path) -> None:
    check_reads(family, saved(family, {}, tmp_path, metadata=False), tmp_path)


def _attention(name: str) -> bool:
    return "attn" in name and "mod" not in name


def _inside(name: str) -> bool:
    return "final" not in name and "guidance" not in name


# What diffusers 0.42.1 reads rightly of other programs' formats. It loses the alphas of attentions that
# differ from the commonest in kohya's files for UNets, and takes every FLUX.1 for 3072 wide where it
# cuts linear1; it reads only the attentions of OneTrainer's files. Without metadata it
# finds the last layer's name at the end of others' and says that it did.
READABLE: list[tuple[str, str, Callable[[str], bool], Sequence[float]]] = [
    ("sd1", "kohya", lambda name: True, (3.0,)),
    ("sd1", "diffusers-2023", _attention, ALPHAS),
    ("sdxl", "kohya", lambda name: True, (3.0,)),
    ("sdxl", "kohya-diffusers", lambda name: True, (3.0,)),
    ("sdxl", "diffusers-2023", _attention, ALPHAS),
    ("flux", "kohya", lambda name: _inside(name) and "linear1" not in name, ALPHAS),
    ("flux", "comfyui", lambda name: _inside(name) and "linear1" not in name and "te1" not in name, ALPHAS),
    ("flux", "ai-toolkit", lambda name: "final_layer_linear" not in name, ALPHAS),
    ("flux", "onetrainer", lambda name: "_attn_" in name or "adaLN" in name, ALPHAS),
    ("flux", "xlabs", lambda name: "_attn_" in name and "te1" not in name, ALPHAS),
    ("sd3", "ai-toolkit", lambda name: True, ALPHAS),
]


@pytest.mark.parametrize(
    "family, to, readable, alphas", READABLE, ids=[f"{family}-{to}" for family, to, *_ in READABLE]
)
def test_what_we_write_for_other_programs_diffusers_reads_alike(
    family: str, to: str, readable: Callable[[str], bool], alphas: Sequence[float], tmp_path: Path
) -> None:
    """By way of diffusers' own format, so that nothing is left of the file it came from."""
    names = {name: modules for name, modules in FILES[family].items() if readable(name)}
    trained = train(pipeline(family), names, alphas=alphas)
    between = written(family, trained, tmp_path, "diffusers")
    convert(between, to, tmp_path / "last.safetensors", ConvertOptions(family=NAMES[family]))
    check_loads(family, tmp_path / "last.safetensors", trained)


def folders(family: str, trained: Trained, folder: Path) -> dict[str, Path]:
    """The PEFT folder of each component."""
    save_file(trained.tensors, folder / "kohya.safetensors")
    convert(folder / "kohya.safetensors", "peft", folder / "peft", ConvertOptions(family=NAMES[family]))
    components = dict.fromkeys(module.partition(":")[0] for module in trained.weights)
    several = len(components) > 1
    return {name: folder / "peft" / name if several else folder / "peft" for name in components}


def check_folder(family: str, component: str, folder: Path, trained: Trained) -> None:
    model = getattr(pipeline(family), component)
    # The folder has the names that text encoders had before transformers 5.6.
    flat = component.startswith("text") and not hasattr(model, "text_model")
    with silence():
        wrapped = peft.PeftModel.from_pretrained(
            copy.deepcopy(model), str(folder), key_mapping={r"^text_model\.": ""} if flat else None
        )
    check_component(family, component, weights(wrapped.merge_and_unload()), trained)


@pytest.mark.parametrize(
    "family, dora", [*((family, False) for family in FAMILIES), ("sd1", True), ("flux", True)]
)
def test_a_kohya_file_written_for_peft_loads_in_each_model(family: str, dora: bool, tmp_path: Path) -> None:
    trained = train(pipeline(family), FILES[family], dora=dora)
    for component, folder in folders(family, trained, tmp_path).items():
        check_folder(family, component, folder, trained)


def factors(tensors: dict[str, Tensor], name: str, rows: int, columns: int, ends: tuple[str, str]) -> None:
    generator = torch.Generator().manual_seed(len(tensors))
    tensors[f"{name}.{ends[0]}.weight"] = torch.randn(rows, 2, generator=generator)
    tensors[f"{name}.{ends[1]}.weight"] = torch.randn(2, columns, generator=generator)


def errors_against(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, float]:
    """By module: how far what diffusers makes of a file is from what we read in it."""
    left, right = (load(tensors, family="flux1") for tensors in (ours, theirs))
    return {difference.name: difference.error for difference in differences(left, right)}


def test_a_fused_kohya_file_of_full_width_is_cut_as_diffusers_cuts_it() -> None:
    """diffusers 0.42.1 writes the last layer without its prefix and loses its alpha."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    tensors: dict[str, Tensor] = {}
    kohya = ("lora_up", "lora_down")
    factors(tensors, "lora_unet_single_blocks_0_linear1", 21504, 3072, kohya)
    factors(tensors, "lora_unet_single_blocks_37_linear2", 3072, 15360, kohya)
    factors(tensors, "lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072, kohya)
    factors(tensors, "lora_unet_double_blocks_18_txt_attn_qkv", 9216, 3072, kohya)
    factors(tensors, "lora_unet_final_layer_adaLN_modulation_1", 6144, 3072, kohya)
    tensors |= {
        key.replace("lora_up.weight", "alpha"): torch.tensor(0.5) for key in tensors if "lora_up" in key
    }
    theirs = _convert_kohya_flux_lora_to_diffusers({key: tensor.clone() for key, tensor in tensors.items()})
    bare = [key for key in theirs if not key.startswith("transformer.")]
    theirs |= {f"transformer.{key}": theirs.pop(key) for key in bare}
    # What it lost: alpha over rank.
    theirs["transformer.norm_out.linear.lora_B.weight"] *= 0.5 / 2
    errors = errors_against(theirs, tensors)
    assert len(errors) == 12 and max(errors.values()) < 1e-6


def test_a_control_file_of_full_width_is_cut_as_diffusers_cuts_it() -> None:
    """Every linear layer with a bias, and the norms replaced, as in FLUX.1-Depth-dev-lora.

    diffusers 0.42.1 swaps the halves of the last modulation in the down factor as well: halves of the rank.
    """
    from diffusers.loaders.lora_conversion_utils import _convert_bfl_flux_control_lora_to_diffusers

    tensors: dict[str, Tensor] = {}
    for name, rows, columns in _control_layers():
        factors(tensors, name, rows, columns, ("lora_B", "lora_A"))
        tensors[f"{name}.lora_B.bias"] = torch.randn(rows)
    norms = {name: torch.randn(128) for name in _control_norms()}
    theirs = _convert_bfl_flux_control_lora_to_diffusers(
        {key: tensor.clone() for key, tensor in (tensors | norms).items()}
    )
    replaced = {key: theirs.pop(key) for key in list(theirs) if "lora_" not in key}
    errors = errors_against(theirs, tensors)
    wrong = {name for name, error in errors.items() if error > 1e-6}
    assert wrong == {"transformer.norm_out.linear"} and len(errors) == 2 * 504
    adapter = load(tensors | norms, family="flux1")
    for name, (change,) in changes_of(adapter, "transformer", kind="set").items():
        assert torch.equal(change.tensors()["value"], replaced.pop(f"transformer.{name}"))
    assert not replaced


def _control_layers() -> Iterator[tuple[str, int, int]]:
    """BFL's names of the linear layers, with their rows and columns."""
    width = 3072
    yield from (("img_in", width, 128), ("txt_in", width, 4096), ("final_layer.linear", 64, width))
    yield "final_layer.adaLN_modulation.1", 2 * width, width
    for embedder, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        yield f"{embedder}.in_layer", width, columns
        yield f"{embedder}.out_layer", width, width
    for block in range(19):
        for stream in ("img", "txt"):
            yield f"double_blocks.{block}.{stream}_mod.lin", 6 * width, width
            yield f"double_blocks.{block}.{stream}_attn.qkv", 3 * width, width
            yield f"double_blocks.{block}.{stream}_attn.proj", width, width
            yield f"double_blocks.{block}.{stream}_mlp.0", 4 * width, width
            yield f"double_blocks.{block}.{stream}_mlp.2", width, 4 * width
    for block in range(38):
        yield f"single_blocks.{block}.linear1", 7 * width, width
        yield f"single_blocks.{block}.linear2", width, 5 * width
        yield f"single_blocks.{block}.modulation.lin", 3 * width, width


def _control_norms() -> Iterator[str]:
    for part in ("query", "key"):
        yield from (
            f"double_blocks.{block}.{stream}_attn.norm.{part}_norm.scale"
            for block in range(19)
            for stream in ("img", "txt")
        )
        yield from (f"single_blocks.{block}.norm.{part}_norm.scale" for block in range(38))


def test_a_control_file_written_for_peft_replaces_norms_and_changes_biases(tmp_path: Path) -> None:
    model = pipeline("flux").transformer
    layers = {
        "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.net.0.proj",
        "single_blocks.3.linear2": "single_transformer_blocks.3.proj_out",
        "final_layer.linear": "proj_out",
    }
    expected = weights(model)
    tensors: dict[str, Tensor] = {}
    for name, module in layers.items():
        rows, columns = expected[f"{module}.weight"].shape
        factors(tensors, name, rows, columns, ("lora_B", "lora_A"))
        tensors[f"{name}.lora_B.bias"] = torch.randn(rows)
        expected[f"{module}.weight"] += tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        expected[f"{module}.bias"] += tensors[f"{name}.lora_B.bias"]
    for name in _control_norms():
        tensors[name] = torch.randn(16)
        part = {"query": "q", "key": "k"}[name.split(".")[-2].removesuffix("_norm")]
        kind, block = name.split(".")[:2]
        stream = "added_" if "txt" in name else ""
        front = "single_transformer_blocks" if kind == "single_blocks" else "transformer_blocks"
        expected[f"{front}.{block}.attn.norm_{stream}{part}.weight"] = tensors[name]
    convert(tensors, "peft", tmp_path / "peft", ConvertOptions(family="flux1"))
    with silence():
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "peft"))
    check_same(weights(wrapped.merge_and_unload()), expected, weights(model))


def test_an_adapter_whose_base_peft_changes_is_not_written_for_others(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa")
    peft.get_peft_model(copy.deepcopy(pipeline("flux").transformer), config).save_pretrained(str(tmp_path))
    with pytest.raises(Unrepresentable) as refused:
        convert(tmp_path, "kohya", tmp_path / "kohya.safetensors", ConvertOptions(family="flux1"))
    assert refused.value.code == "config-needed"


def test_matrices_of_a_file_take_the_axes_of_the_layers_they_are_for(tmp_path: Path) -> None:
    """Some trainers write 1×1 convolutions as matrices and linear layers as 1×1 convolutions."""
    trained = train(pipeline("sd1"), FILES["sd1"])
    for key, tensor in trained.tensors.items():
        if key.endswith(".weight") and "proj_in" in key:
            trained.tensors[key] = tensor.flatten(1)
        elif key.endswith(".weight") and "attn1" in key:
            trained.tensors[key] = tensor[:, :, None, None]
    check_loads("sd1", written("sd1", trained, tmp_path, "diffusers"), trained)
