"""LyCORIS as it is installed: what it saves we read as its layers apply it, what we write it loads."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from oracle_law import changes_of, check_deltas, randomise, relative, silence, weights
from safetensors.torch import load_file
from torch import Tensor, nn

from adapterkit.adapter import Adapter
from adapterkit.compare import differences
from adapterkit.errors import Unrepresentable
from adapterkit.operations.convert import ConvertOptions, convert
from adapterkit.operations.sources import load

pytestmark = pytest.mark.oracle

kohya = pytest.importorskip("lycoris.kohya")
wrapper = pytest.importorskip("lycoris.wrapper")

RANK, ALPHA = 4, 2.0
# A few blocks with every kind of layer; the library's own presets take the time embedding twice.
PRESET = """
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D"]
unet_target_name = ["conv_in", "conv_out"]
exclude_name = ["(down_blocks.[12]|up_blocks.[012]).*"]
"""
LINEAR = """
unet_target_module = ["Attention", "FeedForward"]
unet_target_name = []
exclude_name = ["(down_blocks|up_blocks).*"]
"""


@dataclass(frozen=True)
class Case:
    """What LyCORIS is asked for. reloaded: compare with the network that LyCORIS makes of its file."""

    options: dict[str, Any] = field(default_factory=dict)
    reloaded: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Double, so that rounding hides nothing; the rotations' identity matrix is single."""
        return torch.float32 if self.options["algo"] in ("diag-oft", "boft") else torch.float64

    @property
    def tolerance(self) -> float:
        return 2e-5 if self.dtype == torch.float32 else 1e-7


def algo(name: str, reloaded: bool = False, **options: Any) -> Case:
    return Case({"algo": name, **options}, reloaded)


CASES = {
    "locon": algo("lora", conv_dim=3, conv_alpha=1.0),
    "locon, core": algo("lora", use_tucker=True),
    "locon, scalar": algo("lora", use_scalar=True),
    "locon, rslora": algo("lora", rs_lora=True),
    "dora, rows": algo("lora", dora_wd=True),
    "dora, columns": algo("lora", dora_wd=True, wd_on_output=False),
    "loha": algo("loha"),
    "loha, core": algo("loha", use_tucker=True),
    "loha, scalar": algo("loha", use_scalar=True),
    "loha, dora": algo("loha", dora_wd=True),
    "lokr": algo("lokr", factor=4),
    "lokr, both": algo("lokr", decompose_both=True, factor=8),
    "lokr, both in fours": algo("lokr", decompose_both=True, factor=4),
    "lokr, whole": algo("lokr", full_matrix=True),
    "lokr, unbalanced": algo("lokr", unbalanced_factorization=True, factor=4),
    "lokr, core": algo("lokr", use_tucker=True, factor=4),
    "lokr, scalar": algo("lokr", use_scalar=True, factor=4),
    "lokr, dora": algo("lokr", dora_wd=True, factor=4),
    # Trained, whole matrices are multiplied by the root of a rank that they do not have; read back
    # by LyCORIS, and everywhere else, by one.
    "lokr, rslora": algo("lokr", reloaded=True, rs_lora=True, factor=4),
    "glora": algo("glora"),
    "glora, rslora": algo("glora", rs_lora=True),
    "oft": algo("diag-oft", block_size=8),
    "oft, constrained": algo("diag-oft", block_size=8, constraint=0.01),
    "oft, rescaled": algo("diag-oft", block_size=8, rescaled=True),
    "boft": algo("boft"),
    "boft, rescaled": algo("boft", rescaled=True),
    "ia3": algo("ia3"),
    "full": algo("full"),
    "norms": algo("lora", train_norm=True),
}


@cache
def unet(dtype: torch.dtype = torch.float64) -> nn.Module:
    return models.sd1_unet().to(dtype)


def trained(
    case: Case, folder: Path, text_encoder: nn.Module | None = None, preset: str = PRESET, rank: int = RANK
) -> tuple[Any, nn.Module]:
    """A network of the case over a copy of the UNet, all of its weights random, and that copy."""
    model = copy.deepcopy(unet(case.dtype))
    (folder / "preset.toml").write_text(preset)
    options = {"preset": str(folder / "preset.toml"), "warn_on_unmatched": False, **case.options}
    network = kohya.create_network(1.0, rank, ALPHA, None, text_encoder, model, **options)
    network.apply_to(text_encoder, model, text_encoder is not None, True)
    randomise(network.to(case.dtype), 1, chosen=lambda name: True)
    return network.eval(), model


def reloaded(case: Case, path: Path, text_encoder: nn.Module | None = None) -> tuple[Any, nn.Module]:
    """The network that LyCORIS makes of a file, over another copy of the UNet."""
    model = copy.deepcopy(unet(case.dtype))
    network, state = kohya.create_network_from_weights(1.0, str(path), None, text_encoder, model)
    network.apply_to(text_encoder, model, text_encoder is not None, True)
    assert len(network.loras) == len({key.partition(".")[0] for key in state})
    return network.to(case.dtype).eval(), model


def saved(case: Case, network: Any, folder: Path) -> Path:
    path = folder / "theirs.safetensors"
    # What kohya's trainer adds of its own.
    metadata = {"ss_network_args": json.dumps(case.options), "ss_network_alpha": str(ALPHA)}
    network.save_weights(str(path), None, metadata)
    return path


def sample(layer: nn.Module) -> Tensor:
    """An input of the layer's, in its dtype."""
    return _sample(layer).to(next(layer.parameters()).dtype)


def _sample(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    match layer:
        case nn.Conv2d():
            return torch.randn(1, layer.in_channels, 4, 4, generator=generator)
        case nn.GroupNorm():
            return torch.randn(1, layer.num_channels, 4, 4, generator=generator)
        case nn.LayerNorm():
            return torch.randn(3, layer.normalized_shape[0], generator=generator)
        case nn.Linear():
            return torch.randn(3, layer.in_features, generator=generator)
    raise AssertionError(layer)


def changed_layer(adapter: Adapter, name: str, layer: nn.Module) -> nn.Module:
    """A copy of the layer with the adapter's changes added to its weight and bias."""
    changes = changes_of(adapter, "unet")
    own = copy.deepcopy(layer)
    for param, tensor in list(own.named_parameters()):
        for change in changes.get(f"{name}.{param}", ()):
            tensor.data += change.dense(tensor.data, torch.float64)
    return own


def layers_of(network: Any) -> Iterator[str]:
    """A spread sample of the names of the layers that a network changes, one of each kind at least."""
    changed = {name.removeprefix("lora_unet_").removeprefix("lycoris_") for name in _loras(network)}
    names = [name for name in _names() if name.replace(".", "_") in changed]
    seen: set[object] = set()
    for number, name in enumerate(names):
        layer = unet().get_submodule(name)
        kind = (type(layer), getattr(layer, "kernel_size", None), getattr(layer, "stride", None))
        if kind not in seen or number % 12 == 0:
            yield name
        seen.add(kind)


def _loras(network: Any) -> set[str]:
    """A network's names for its layers; kohya's keeps those of the UNet apart."""
    return {lora.lora_name for lora in getattr(network, "unet_loras", network.loras)}


@cache
def _names() -> tuple[str, ...]:
    return tuple(name for name, _ in unet().named_modules())


def check_layers(case: Case, adapter: Adapter, network: Any, model: nn.Module) -> None:
    """Each layer with our changes answers as LyCORIS's does in its place."""
    names = list(layers_of(network))
    assert len(names) > 8
    for name in names:
        plain = unet(case.dtype).get_submodule(name)
        x = sample(plain)
        theirs, ours = model.get_submodule(name)(x), changed_layer(adapter, name, plain)(x)
        untouched = plain(x)
        error = relative(ours - untouched, theirs - untouched)
        assert error <= case.tolerance, (name, error)


@pytest.mark.parametrize("name", CASES)
def test_what_lycoris_saves_changes_the_layers_as_it_applies_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    network, model = trained(case, tmp_path)
    path = saved(case, network, tmp_path)
    adapter = load(path, family="sd1")
    assert len({place.span for place in adapter.changes}) == len(network.unet_loras)
    if case.reloaded:
        network, model = reloaded(case, path)
    with torch.no_grad():
        check_layers(case, adapter, network, model)


# LyCORIS 4.1.3 builds wrong modules from its own files of other algorithms: DoRA along columns, LoKr with
# a core or divided unevenly, IA³; and multiplies the constraint of an OFT by the rows once more.
READABLE = (
    *("locon", "locon, core", "locon, scalar", "dora, rows", "loha, core"),
    *("lokr, both", "glora, rslora", "oft, rescaled", "full", "norms"),
)


@pytest.mark.parametrize("name", READABLE)
def test_what_we_write_as_kohya_lycoris_applies_alike(name: str, tmp_path: Path) -> None:
    """By way of ComfyUI's names, which are the original ones, and back."""
    case = CASES[name]
    network, _ = trained(case, tmp_path)
    path = saved(case, network, tmp_path)
    between, last = tmp_path / "between.safetensors", tmp_path / "last.safetensors"
    # What is written is looked at below.
    options = ConvertOptions(family="sd1", verify="none")
    convert(path, "comfyui", between, options)
    convert(between, "kohya", last, options)
    ours, copied = reloaded(case, last)
    assert _loras(ours) == _loras(network)
    adapter = load(path, family="sd1")
    with torch.no_grad():
        check_layers(case, adapter, ours, copied)


@pytest.mark.parametrize("name", ["loha", "lokr, both"])
def test_the_helper_of_lycoris_applies_the_scale_twice_where_its_layer_does_once(
    name: str, tmp_path: Path
) -> None:
    """get_diff_weight multiplies by alpha over rank a weight that has it already; 4.1.3 merges by it."""
    case = CASES[name]
    network, model = trained(case, tmp_path)
    adapter = load(saved(case, network, tmp_path), family="sd1")
    (lora,) = [
        one for one in network.unet_loras if one.lora_name == "lora_unet_mid_block_attentions_0_proj_in"
    ]
    (change,) = changes_of(adapter, "unet")["mid_block.attentions.0.proj_in.weight"]
    with torch.no_grad():
        helper, _ = lora.get_diff_weight(multiplier=1.0, shape=lora.shape)
        delta = change.dense(dtype=torch.float64).reshape(helper.shape)
        assert relative(helper, delta * lora.scale) < 1e-7 and lora.scale == ALPHA / RANK
        check_layers(case, adapter, network, model)


@pytest.mark.parametrize("name", ["locon", "loha", "lokr, both", "oft"])
def test_the_wrapper_of_any_module_is_read_by_its_own_prefix(name: str, tmp_path: Path) -> None:
    """SimpleTuner's LyCORIS files are made so; the prefix tells no component."""
    case = CASES[name]
    model = copy.deepcopy(unet(case.dtype))
    wrapper.LycorisNetwork.apply_preset(tomllib.loads(PRESET.replace("unet_target", "target")))
    options = {"linear_dim": RANK, "linear_alpha": ALPHA, **case.options}
    network = wrapper.create_lycoris(model, 1.0, **options)
    network.apply_to()
    randomise(network.to(case.dtype), chosen=lambda name: True)
    path = tmp_path / "theirs.safetensors"
    network.eval().save_weights(str(path), None, {})
    adapter = load(path, family="sd1")
    with torch.no_grad():
        check_layers(case, adapter, network, model)


def test_text_encoders_are_read_under_the_names_of_old_and_new_transformers(tmp_path: Path) -> None:
    """transformers 5.6 took the outer module away, and with it a part of every name in such a file."""
    encoder = models.clip_l().double()
    case = CASES["loha"]
    network, _ = trained(case, tmp_path, text_encoder=copy.deepcopy(encoder))
    path = saved(case, network, tmp_path)
    flat = load(path, family="sd1")
    renamed = {
        key.replace("lora_te_encoder", "lora_te_text_model_encoder"): tensor
        for key, tensor in load_file(str(path)).items()
    }
    old = load(renamed, family="sd1")
    assert len(changes_of(flat, "text_encoder")) == 72
    assert changes_of(flat, "text_encoder").keys() == changes_of(old, "text_encoder").keys()
    assert all(difference.error == 0 for difference in differences(flat, old))


@pytest.mark.parametrize("name", ["dylora", "tlora"])
def test_every_tensor_of_the_other_algorithms_is_explained_and_kept(name: str, tmp_path: Path) -> None:
    case = algo(name)
    network, _ = trained(case, tmp_path, preset=LINEAR)
    path = saved(case, network, tmp_path)
    adapter = load(path, family="sd1")
    assert adapter.receipt.mapped == adapter.receipt.total
    between, last = tmp_path / "between.safetensors", tmp_path / "last.safetensors"
    options = ConvertOptions(family="sd1", verify="none")
    convert(path, "comfyui", between, options)
    convert(between, "kohya", last, options)
    theirs, ours = load_file(str(path)), load_file(str(last))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], theirs[key].to(ours[key].dtype)) for key in theirs)


def check_peft(case: Case, path: Path, folder: Path) -> None:
    """PEFT builds the modules that the folder has and merges them as the file at `path` says."""
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(unet(case.dtype))
    before = weights(base)
    with silence():
        wrapped = peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    after = weights(wrapped.merge_and_unload())
    check_deltas(load(path, family="sd1"), before, after, component="unet", tolerance=1e-6)


IN_PEFT = [
    ("loha", PRESET, RANK),
    ("loha, core", PRESET, RANK),
    ("dora, rows", PRESET, RANK),
    ("lokr", LINEAR, RANK),
    ("lokr, whole", LINEAR, RANK),
    ("lokr, both in fours", LINEAR, 1),
]


@pytest.mark.parametrize("name, preset, rank", IN_PEFT, ids=[name for name, *_ in IN_PEFT])
def test_what_we_write_for_peft_loads_and_changes_the_weights_alike(
    name: str, preset: str, rank: int, tmp_path: Path
) -> None:
    case = CASES[name]
    network, _ = trained(case, tmp_path, preset=preset, rank=rank)
    path = saved(case, network, tmp_path)
    convert(path, "peft", tmp_path / "ours", ConvertOptions(family="sd1", verify="none"))
    check_peft(case, path, tmp_path / "ours")


@pytest.mark.parametrize(
    "name, code",
    [("locon, core", "no-such-role"), ("lokr, unbalanced", "peft-factors"), ("loha, dora", "magnitude-kind")],
)
def test_what_peft_would_build_otherwise_is_refused_and_expands(name: str, code: str, tmp_path: Path) -> None:
    case = CASES[name]
    network, _ = trained(case, tmp_path, preset=LINEAR if "lokr" in name else PRESET)
    path = saved(case, network, tmp_path)
    options = ConvertOptions(family="sd1", verify="none")
    with pytest.raises(Unrepresentable) as refused:
        convert(path, "peft", tmp_path / "ours", options)
    assert refused.value.code == code and refused.value.hint.startswith("--as lora")
    convert(path, "peft", tmp_path / "ours", replace(options, as_lora=True))
    check_peft(case, path, tmp_path / "ours")


def test_an_ia3_that_would_scale_biases_too_is_refused(tmp_path: Path) -> None:
    case = CASES["ia3"]
    path = saved(case, trained(case, tmp_path)[0], tmp_path)
    with pytest.raises(Unrepresentable) as refused:
        convert(path, "peft", tmp_path / "ours", ConvertOptions(family="sd1"))
    assert refused.value.code == "ia3-bias"
