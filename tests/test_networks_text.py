"""The tables of CLIP and T5 against transformers, and against the converters of diffusers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from network_mutants import lowered, survivors
from oracle_rows import Checkpoint, row_map, rows_of, shapes_of

from adapterkit.specs.names import network

# (layers, width, feed-forward width, heads, width of the projection or None)
CLIP_CONFIGS = {
    "clip_l": (12, 768, 3072, 12, None),
    "clip_l_proj": (12, 768, 3072, 12, 768),
    "clip_h": (23, 1024, 4096, 16, None),
    "clip_g": (32, 1280, 5120, 20, 1280),
}
PLAIN_CLIPS = tuple(name for name, config in CLIP_CONFIGS.items() if config[-1] is None)
# Where single-file checkpoints keep OpenCLIP's names: Stable Diffusion 2 and SDXL.
SD2_PREFIX = "cond_stage_model.model."
SDXL_PREFIX = "conditioner.embedders.1.model."


def build_clip(name: str) -> Any:
    """The published model on the meta device, without weights."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    layers, width, ff, heads, projection = CLIP_CONFIGS[name]
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection or 512,
    )
    with torch.device("meta"):
        return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def shapes_of_model(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def classic(name: str) -> str:
    """A name as transformers wrote it before 5.6, whichever version is installed."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


@pytest.mark.oracle
@pytest.mark.parametrize("name", CLIP_CONFIGS)
def test_the_inventory_is_the_clip_that_transformers_builds(name: str) -> None:
    theirs = shapes_of_model(build_clip(name))
    assert dict(network(name).shapes) == {classic(key): shape for key, shape in theirs.items()}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CLIP_CONFIGS)
def test_every_clip_of_transformers_has_the_names_of_one_of_the_namings(name: str) -> None:
    theirs = shapes_of_model(build_clip(name))
    namings = network(name).namings
    assert theirs in [shapes_of(network(name), key) for key in ("hf", "hf_flat") if key in namings]


@pytest.mark.parametrize("name", PLAIN_CLIPS)
def test_flat_names_are_the_classic_ones_without_their_first_part(name: str) -> None:
    flat = {row.native: row.span for row in network(name).namings["hf_flat"].rows}
    assert {f"text_model.{native}": span for native, span in flat.items()} == {
        row.native: row.span for row in network(name).namings["hf"].rows
    }


@pytest.mark.parametrize("name", ["clip_g", "clip_l_proj"])
def test_a_projection_keeps_its_name_in_flat_names(name: str) -> None:
    """CLIPTextModelWithProjection nests the text model in every version; a plain CLIPTextModel does not."""
    projection = network(name).namings["hf_flat"].find("text_projection")
    assert projection is not None and projection.span[0].module == "text_projection"


@pytest.mark.oracle
@pytest.mark.parametrize("name", CLIP_CONFIGS)
def test_openclip_names_are_what_the_converter_of_diffusers_reads(name: str) -> None:
    small = lowered(network(name), 64)
    theirs = row_map(open_clip_converter(name, SDXL_PREFIX), shapes_of(small, "openclip"))
    assert rows_of(small, "openclip") == theirs


@pytest.mark.oracle
def test_what_sd2_leaves_out_of_openclip_is_its_last_layer_and_the_projection() -> None:
    """The checkpoint has OpenCLIP's 24 layers; the converter drops by name what transformers' model lacks."""
    small = lowered(network("clip_h"), 64)
    shapes = shapes_of(small, "openclip")
    last = {key.replace(".22.", ".23."): shape for key, shape in shapes.items() if ".22." in key}
    width = shapes["ln_final.weight"][0]
    checkpoint = {**shapes, **last, "text_projection": (width, width), "logit_scale": ()}
    assert rows_of(small, "openclip") == row_map(open_clip_converter("clip_h", SD2_PREFIX), checkpoint)


def open_clip_converter(name: str, prefix: str) -> Any:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    # The converter cuts at the width the model's configuration says.
    width = CLIP_CONFIGS[name][1] // 64
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))

    def convert(checkpoint: Checkpoint) -> Any:
        prefixed = {prefix + key: ids for key, ids in checkpoint.items()}
        return convert_open_clip_checkpoint(model, prefixed, prefix=prefix)

    return convert


def test_openclips_projection_is_the_transpose_of_the_linear_layer() -> None:
    row = network("clip_g").namings["openclip"].find("text_projection")
    assert row is not None
    assert row.param == "weight"
    assert [(piece.module, piece.transposed) for piece in row.span] == [("text_projection", True)]


@pytest.mark.oracle
@pytest.mark.parametrize("name", CLIP_CONFIGS)
def test_attention_processor_names_are_what_diffusers_reads(name: str) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft

    rows = network(name).namings["attn_processor"].rows
    for side, peft in (("up", "lora_B"), ("down", "lora_A")):
        theirs = convert_state_dict_to_peft({f"{row.native}_lora.{side}.weight": row.native for row in rows})
        assert theirs == {f"{row.span[0].module}.{peft}.weight": row.native for row in rows}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CLIP_CONFIGS)
def test_the_attention_of_every_layer_has_attention_processor_names(name: str) -> None:
    rows = network(name).namings["attn_processor"].rows
    assert [row.span[0].module for row in rows] == linear_layers_of_attention(name)


@pytest.mark.oracle
@pytest.mark.parametrize("name", PLAIN_CLIPS)
def test_cloneofsimo_counts_the_linear_layers_of_the_attentions_as_they_are_registered(name: str) -> None:
    """lora_diffusion walks model.modules() for CLIPAttention, then its named_modules() for linear layers."""
    cloneofsimo = network(name).namings["cloneofsimo"]
    layers = linear_layers_of_attention(name)
    assert len(cloneofsimo.rows) == len(layers)
    for number, layer in enumerate(layers):
        row = cloneofsimo.find(str(number))
        assert row is not None
        assert [piece.module for piece in row.span] == [layer]


def linear_layers_of_attention(name: str) -> list[str]:
    """Canonical names of the linear layers below each CLIPAttention, in order of registration."""
    from torch import nn

    return [
        classic(f"{path}.{child}")
        for path, module in build_clip(name).named_modules()
        if type(module).__name__ == "CLIPAttention"
        for child, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]


@pytest.mark.oracle
def test_the_inventory_is_the_t5_that_transformers_builds() -> None:
    """Its parameters, that is: `encoder.embed_tokens.weight` is `shared.weight` under a second name."""
    import torch
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = T5EncoderModel(config)
    assert dict(network("t5_xxl").shapes) == shapes_of_model(model)
    assert set(model.state_dict()) - set(network("t5_xxl").shapes) == {"encoder.embed_tokens.weight"}
    assert model.encoder.embed_tokens.weight is model.shared.weight


@pytest.mark.parametrize("naming", ["hf_flat", "openclip", "attn_processor", "cloneofsimo"])
def test_no_single_mistake_in_a_table_goes_unnoticed(naming: str) -> None:
    assert survivors("clip.toml", naming, 256) == []
