"""LyCORIS as it is installed: what it saves we read as its layers apply it, what we write it loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from adapterkit.adapter import Adapter
from adapterkit.operations.convert import ConvertOptions, convert
from adapterkit.operations.sources import load
from oracle_law import changes_of, randomise, relative

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
    case: Case, folder: Path, text_encoder: nn.Module | None = None, seed: int = 1
) -> tuple[Any, nn.Module]:
    """A network of the case over a copy of the UNet, all of its weights random, and that copy."""
    model = copy.deepcopy(unet(case.dtype))
    preset = folder / "preset.toml"
    preset.write_text(PRESET)
    options = {"preset": str(preset), "warn_on_unmatched": False, **case.options}
    network = kohya.create_network(1.0, RANK, ALPHA, None, text_encoder, model, **options)
    network.apply_to(text_encoder, model, text_encoder is not None, True)
    randomise(network.to(case.dtype), seed, chosen=lambda name: True)
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
    return _sample(layer).to(layer.weight.dtype)


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
    names = [name for name in _names() if f"lora_unet_{name.replace('.', '_')}" in _loras(network)]
    seen: set[object] = set()
    for number, name in enumerate(names):
        layer = unet().get_submodule(name)
        kind = (type(layer), getattr(layer, "kernel_size", None), getattr(layer, "stride", None))
        if kind not in seen or number % 12 == 0:
            yield name
        seen.add(kind)


def _loras(network: Any) -> set[str]:
    return {lora.lora_name for lora in network.unet_loras}


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
    *("locon", "locon, core", "locon, scalar", "dora, rows", "loha", "loha, core"),
    *("lokr", "lokr, both", "glora, rslora", "oft, rescaled", "boft", "full", "norms"),
)


@pytest.mark.parametrize("name", READABLE)
def test_what_we_write_as_kohya_lycoris_applies_alike(name: str, tmp_path: Path) -> None:
    """By way of ComfyUI's names, which are the original ones, and back."""
    case = CASES[name]
    network, model = trained(case, tmp_path)
    path = saved(case, network, tmp_path)
    between, last = tmp_path / "between.safetensors", tmp_path / "last.safetensors"
    convert(path, "comfyui", between, ConvertOptions(family="sd1"))
    convert(between, "kohya", last, ConvertOptions(family="sd1"))
    ours, copied = reloaded(case, last)
    theirs, _ = reloaded(case, path)
    assert _loras(ours) == _loras(theirs)
    adapter = load(path, family="sd1")
    with torch.no_grad():
        check_layers(case, adapter, ours, copied)
