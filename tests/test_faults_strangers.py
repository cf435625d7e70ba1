"""Files that are no adapter, or one of a model without a table: what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from front_door import Fault, Q, Tensors, check_fault, kohya, names, raw, saved, write
from hostile import safetensors_bytes

from adapterkit import inspect


def flat_strangers(count: int) -> Tensors:
    """A LoRA of modules that no table has, named as kohya names them."""
    return {
        f"lora_unet_strange_block_{block}_mixer.lora_{side}.weight": torch.ones(4, 4)
        for block in range(count)
        for side in ("up", "down")
    }


STRANGERS = [
    Fault(
        "no tensors",
        raw(safetensors_bytes({}, b"")),
        "unrecognized",
        ("there are no tensors in it",),
        "again",
    ),
    Fault(
        "nothing but metadata",
        raw(safetensors_bytes({"__metadata__": {"ss_network_dim": "4"}}, b"")),
        "unrecognized",
        ("there are no tensors in it",),
        "again",
    ),
    Fault(
        "a LoRA of an unknown model",
        saved(flat_strangers(3)),
        "unrecognized",
        (
            "LoRA for a model that no table knows: 6 tensors",
            "`lora_unet_strange_block_0_mixer.lora_down.weight`",
        ),
        "formats/README.md",
    ),
    Fault(
        "a LoRA of which little is known",
        saved(kohya() | flat_strangers(200)),
        "unrecognized",
        ("nearest: sdxl as kohya 2 %", "of 409 tensors"),
        "--family sdxl",
    ),
    *(
        Fault(
            what, saved(names(*keys)), "unrecognized", (f"{what}, not an adapter", f"`{min(keys)}`"), "--keys"
        )
        for what, *keys in [
            (
                "a full checkpoint",
                "model.diffusion_model.out.2.weight",
                "first_stage_model.decoder.conv_in.weight",
            ),
            ("a ControlNet", "controlnet_down_blocks.0.weight", "down_blocks.0.attentions.0.proj_in.weight"),
            ("a ControlNet", "control_model.zero_convs.0.0.weight"),
            (
                "a ControlNet-LLLite",
                "lllite_conditioning1.0.weight",
                f"{Q.replace('lora', 'lllite')}.down.0.weight",
            ),
            (
                "a Control-LoRA",
                "lora_controlnet",
                "input_blocks.1.0.in_layers.2.up",
                "input_blocks.1.0.in_layers.2.down",
            ),
            ("an IP-Adapter", "image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
            ("a textual inversion", "emb_params"),
            ("a textual inversion", "clip_g", "clip_l"),
            ("a textual inversion", "text_encoders_0", "text_encoders_1"),
            ("a VAE", "encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"),
            ("a VAE", "first_stage_model.encoder.conv_in.weight"),
        ]
    ),
    *(
        Fault(
            what,
            saved(names(*keys)),
            "unrecognized",
            ("not an adapter: nothing in it is named as",),
            "checkpoint",
        )
        for what, *keys in [
            ("a UNet", "down_blocks.0.attentions.0.proj_in.weight", "conv_in.weight", "conv_in.bias"),
            ("a language model", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"),
            ("a FLUX.1 transformer", "double_blocks.0.img_attn.norm.query_norm.scale", "img_in.weight"),
        ]
    ),
]


@pytest.mark.parametrize("fault", STRANGERS, ids=str)
def test_a_stranger_is_called_by_its_name(fault: Fault, tmp_path: Path) -> None:
    check_fault(fault, tmp_path)


def test_inspect_works_for_a_model_without_a_table_where_names_are_dotted(tmp_path: Path) -> None:
    tensors = {
        f"transformer.strange.{n}.mixer.lora_{s}.weight": torch.ones(4, 4) for n in range(3) for s in "AB"
    }
    found = inspect(write(tmp_path / "style.safetensors", tensors))
    assert (found.family, found.components[0].modules, found.problems) == ("diffusers", 3, ())
