"""The tables of FLUX.1 and Stable Diffusion 3 against diffusers: its models and its converters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from network_mutants import lowered, survivors
from oracle_rows import Checkpoint, row_map, rows_of, shapes_of

from adapterkit.specs.names import Network, network

SD3_COMMON = {"sample_size": 128, "attention_head_dim": 64, "joint_attention_dim": 4096}
SD3_CONFIGS: dict[str, dict[str, Any]] = {
    "sd3_medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "sd35_medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd35_large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
SD3_SIZES = tuple(SD3_CONFIGS)


def build_flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def build_sd3(size: str) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        **SD3_COMMON, **SD3_CONFIGS[size], pooled_projection_dim=2048, out_channels=16
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "flux1": build_flux,
    **{size: lambda size=size: build_sd3(size) for size in SD3_SIZES},
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", BUILDERS)
def test_the_inventory_is_the_model_that_diffusers_builds(name: str) -> None:
    import torch

    with torch.device("meta"):
        model = BUILDERS[name]()
    assert dict(network(name).shapes) == {key: tuple(t.shape) for key, t in model.state_dict().items()}


@pytest.mark.oracle
def test_flux_in_its_original_names_is_what_the_converter_of_diffusers_reads() -> None:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    flux1 = network("flux1")
    # The converter cuts `linear1` at multiples of 3072 whatever its height, so its parts keep theirs.
    stacks = [row.span for row in flux1.namings["bfl"].rows if row.native.endswith("linear1")]
    small = lowered(flux1, 64, keep={piece.module for span in stacks for piece in span})
    assert_converter_agrees(small, "bfl", convert_flux_transformer_checkpoint_to_diffusers)


@pytest.mark.oracle
@pytest.mark.parametrize("size", SD3_SIZES)
def test_sd3_in_its_original_names_is_what_the_converter_of_diffusers_reads(size: str) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    assert_converter_agrees(
        lowered(network(size), 64), "mmdit", convert_sd3_transformer_checkpoint_to_diffusers
    )


def assert_converter_agrees(small: Network, naming: str, convert: Callable[[Checkpoint], Any]) -> None:
    theirs = row_map(convert, shapes_of(small, naming))
    ours = rows_of(small, naming)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


@pytest.mark.oracle
def test_xlabs_names_are_what_the_converter_of_diffusers_reads() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    def convert(checkpoint: Checkpoint) -> Checkpoint:
        """Each weight's row ids stand in `up`, which is what the converter cuts."""
        ups = {name.replace(".weight", ".up.weight"): ids for name, ids in checkpoint.items()}
        downs = {name.replace(".up.", ".down."): ids[:1] for name, ids in ups.items()}
        adapter = _convert_xlabs_flux_lora_to_diffusers({**downs, **ups})
        return {
            name.removeprefix("transformer.").replace(".lora_B.weight", ".weight"): ids
            for name, ids in adapter.items()
            if ".lora_B." in name
        }

    small = lowered(network("flux1"), 64)
    shapes = {name: shape for name, shape in shapes_of(small, "xlabs").items() if name.endswith(".weight")}
    ours = {name: rows for name, rows in rows_of(small, "xlabs").items() if name.endswith(".weight")}
    assert ours == row_map(convert, shapes)


def test_xlabs_counts_the_image_stream_first_and_the_text_stream_second() -> None:
    """x-flux adds qkv_lora1 to img_attn and qkv_lora2 to txt_attn (src/flux/modules/layers.py)."""
    xlabs, bfl = network("flux1").namings["xlabs"], network("flux1").namings["bfl"]
    for stream, number in (("img", 1), ("txt", 2)):
        for layer in ("qkv", "proj"):
            lora = xlabs.find(f"double_blocks.18.processor.{layer}_lora{number}")
            base = bfl.find(f"double_blocks.18.{stream}_attn.{layer}")
            assert lora is not None
            assert base is not None
            assert lora.span == base.span


def test_an_xlabs_single_block_leaves_the_mlp_rows_of_linear1_alone() -> None:
    lora = network("flux1").namings["xlabs"].find("single_blocks.37.processor.qkv_lora")
    base = network("flux1").namings["bfl"].find("single_blocks.37.linear1")
    assert lora is not None
    assert base is not None
    assert lora.span == base.span[:3]


def test_flux_in_its_original_names_has_the_314_layers_and_152_scales_of_the_control_adapters() -> None:
    """black-forest-labs/FLUX.1-Canny-dev-lora trains every linear layer and replaces every norm's scale."""
    rows = network("flux1").namings["bfl"].rows
    assert sum(row.param is None for row in rows) == 314
    assert sum(row.native.endswith("_norm.scale") for row in rows) == 152


@pytest.mark.parametrize(
    ("name", "original", "renamed"),
    [("flux1", "bfl", {"img_in": "img_in.proj"}), *((size, "mmdit", {}) for size in SD3_SIZES)],
)
def test_omi_numbers_the_parts_of_every_fused_layer_and_keeps_all_other_names(
    name: str, original: str, renamed: dict[str, str]
) -> None:
    namings = network(name).namings
    expected = {}
    for row in namings[original].rows:
        native = renamed.get(row.native, row.native)
        if len({piece.module for piece in row.span}) == 1:
            expected[native] = [piece.module for piece in row.span]
        else:
            expected |= {f"{native}.{number}": [piece.module] for number, piece in enumerate(row.span)}
    assert {row.native: [piece.module for piece in row.span] for row in namings["omi"].rows} == expected


@pytest.mark.parametrize(
    ("name", "native", "canonical"),
    [
        ("flux1", "double_blocks.3.txt_attn.qkv.1", "transformer_blocks.3.attn.add_k_proj"),
        ("flux1", "single_blocks.3.linear1.3", "single_transformer_blocks.3.proj_mlp"),
        ("flux1", "img_in.proj", "x_embedder"),
        ("sd35_medium", "joint_blocks.3.x_block.attn2.qkv.2", "transformer_blocks.3.attn2.to_v"),
        ("sd3_medium", "joint_blocks.23.context_block.attn.qkv.0", "transformer_blocks.23.attn.add_q_proj"),
    ],
)
def test_omi_names_are_those_onetrainer_wrote(name: str, native: str, canonical: str) -> None:
    """Nerogar/OneTrainer modules/util/convert/lora/convert_{flux,sd3}_lora.py at 8fd97dcc."""
    row = network(name).namings["omi"].find(native)
    assert row is not None
    assert [piece.module for piece in row.span] == [canonical]


@pytest.mark.parametrize(
    ("file", "naming"),
    [("flux1.toml", n) for n in ("bfl", "omi", "xlabs")] + [("mmdit.toml", n) for n in ("mmdit", "omi")],
)
def test_no_single_mistake_in_a_table_goes_unnoticed(file: str, naming: str) -> None:
    assert survivors(file, naming, 512) == []
