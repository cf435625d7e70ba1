"""Baking is what PEFT's own merge makes of the same adapter, whatever its kind and the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adapterkit.operations.bake import BakeOptions, bake

pytestmark = pytest.mark.oracle

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj"]
# Model, and PEFT's configuration.
CASES: dict[str, tuple[str, Any]] = {
    "LoRA on Llama": ("llama", lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")),
    "rsLoRA on Qwen": (
        "qwen3",
        lambda: peft.LoraConfig(
            r=4,
            use_rslora=True,
            target_modules=LINEAR,
            rank_pattern={"v_proj": 2},
            alpha_pattern={"o_proj": 3},
        ),
    ),
    "DoRA on Llama": ("llama", lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=LINEAR)),
    "LoRA on GPT-2": (
        "gpt2",
        lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    ),
    "DoRA on GPT-2": (
        "gpt2",
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "IA3 on GPT-2": (
        "gpt2",
        lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ),
    "IA3 on Llama": (
        "llama",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "IA3 on BERT": (
        "bert",
        lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
    ),
    "LoHa on Llama": ("llama", lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=LINEAR)),
    "LoKr on Llama": ("llama", lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=LINEAR)),
    "OFT on Llama": ("llama", lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=LINEAR)),
    "BOFT on Llama": (
        "llama",
        lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "o_proj"]),
    ),
    "VeRA on Llama": ("llama", lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"])),
    "AdaLoRA on Llama": (
        "llama",
        lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=LINEAR),
    ),
    "LoRA and a head on BERT": (
        "bert",
        lambda: peft.LoraConfig(r=4, target_modules=["query", "dense"], modules_to_save=["classifier"]),
    ),
    "LoRA on T5": ("t5", lambda: peft.LoraConfig(r=4, target_modules=["q", "v", "wo"])),
    "LoRA on CLIP": (
        "clip_l",
        lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "out_proj", "fc1"], bias="lora_only"
        ),
    ),
    "DoRA on CLIP with its projection": (
        "clip_g",
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["k_proj", "fc2", "text_projection"]),
    ),
    "LoRA on an embedding": (
        "llama",
        lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    ),
    "LoRA with biases": ("bert", lambda: peft.LoraConfig(r=4, target_modules=["query"], bias="all")),
    "LoRA and tokens": (
        "llama",
        lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 50, 9]}
        ),
    ),
    "LoRA on experts": (
        "mixtral",
        lambda: peft.LoraConfig(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    ),
    "LoRA on layers of experts": (
        "mixtral",
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
    ),
}


def trained(model: nn.Module, config: Any) -> Any:
    """The model with an adapter whose every tensor is random, and small enough for a sound model."""
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(7)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.05 * noise)
    return tuned


def saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What transformers writes of a model, by the names in its file."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def worst(one: dict[str, Tensor], two: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """The greatest error of a tensor, relative to its change."""
    assert one.keys() == two.keys()
    errors = [0.0]
    for name, tensor in one.items():
        change = float((two[name] - base[name]).norm()) if base[name].shape == two[name].shape else 1.0
        error = float((tensor - two[name]).norm())
        errors.append(error / change if change else error)
    return max(errors)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_bake_is_pefts_merge(name: str, tmp_path: Path) -> None:
    model_name, config = CASES[name]
    model = models.MODELS[model_name]()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            # They are nothing but zeros, which scaling leaves as they are.
            parameter.add_(0.1)
    tuned = trained(model, config())
    tuned.save_pretrained(tmp_path / "adapter")
    base = saved(model, tmp_path / "base")
    # Several diffusion models have CLIP; a bare one is a model of transformers like others.
    options = BakeOptions(family="transformers" if "clip" in model_name else None)
    done = bake(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "baked", options)
    merged = saved(tuned.merge_and_unload(), tmp_path / "merged")
    assert worst(load_file(tmp_path / "baked" / "model.safetensors"), merged, base) < 2e-6
    assert done.plan.outcomes.total() == done.plan.outcomes["applied"]
    assert done.plan.changed + done.plan.untouched == len(base)
