"""kohya's files for small real models, made by hand: names, shapes, and what they mean, from no table.

Each row says which modules of which of the pipeline's models one of kohya's names stacks, as
sd-scripts' networks train them. What a file does to the weights is computed here from its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Names = dict[str, list[str]]

_SD1_UNET = {
    "down_blocks_0_attentions_0_proj_in": "down_blocks.0.attentions.0.proj_in",
    "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "down_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k": (
        "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k"
    ),
    "mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ),
    "up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_out_0": (
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0"
    ),
    "up_blocks_1_resnets_0_conv1": "up_blocks.1.resnets.0.conv1",
    "down_blocks_0_downsamplers_0_conv": "down_blocks.0.downsamplers.0.conv",
}
_SDXL_UNET = {
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "input_blocks_8_1_transformer_blocks_9_attn2_to_v": (
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v"
    ),
    "middle_block_1_transformer_blocks_9_ff_net_2": "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
    "output_blocks_0_1_transformer_blocks_0_attn2_to_k": (
        "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    ),
    "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
}
_CLIP = {
    "text_model_encoder_layers_0_self_attn_q_proj": "text_model.encoder.layers.0.self_attn.q_proj",
    "text_model_encoder_layers_11_self_attn_out_proj": "text_model.encoder.layers.11.self_attn.out_proj",
    "text_model_encoder_layers_3_mlp_fc1": "text_model.encoder.layers.3.mlp.fc1",
}
_FLUX: Mapping[str, str | list[str]] = {
    "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "double_blocks_18_txt_attn_qkv": [f"transformer_blocks.18.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks_0_img_attn_proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks_0_txt_attn_proj": "transformer_blocks.0.attn.to_add_out",
    "double_blocks_1_img_mlp_0": "transformer_blocks.1.ff.net.0.proj",
    "double_blocks_1_txt_mlp_2": "transformer_blocks.1.ff_context.net.2",
    "double_blocks_2_img_mod_lin": "transformer_blocks.2.norm1.linear",
    "double_blocks_2_txt_mod_lin": "transformer_blocks.2.norm1_context.linear",
    "single_blocks_0_linear1": [
        *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ],
    "single_blocks_37_linear2": "single_transformer_blocks.37.proj_out",
    "single_blocks_5_modulation_lin": "single_transformer_blocks.5.norm.linear",
}
_FLUX_OUTSIDE = {
    "final_layer_adaLN_modulation_1": "norm_out.linear",
    "final_layer_linear": "proj_out",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
}
_SD3: Mapping[str, str | list[str]] = {
    "joint_blocks_0_x_block_attn_qkv": [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "joint_blocks_22_context_block_attn_qkv": [
        f"transformer_blocks.22.attn.add_{part}_proj" for part in "qkv"
    ],
    "joint_blocks_1_x_block_attn_proj": "transformer_blocks.1.attn.to_out.0",
    "joint_blocks_1_context_block_mlp_fc1": "transformer_blocks.1.ff_context.net.0.proj",
    "joint_blocks_2_x_block_adaLN_modulation_1": "transformer_blocks.2.norm1.linear",
    "joint_blocks_23_context_block_adaLN_modulation_1": "transformer_blocks.23.norm1_context.linear",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
# The original keeps (shift, scale) where diffusers keeps (scale, shift).
SWAPPED = (
    "lora_unet_final_layer_adaLN_modulation_1",
    "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1",
)


def _rows(prefix: str, component: str, names: Mapping[str, str | list[str]]) -> Names:
    return {
        prefix + name: [f"{component}:{module}" for module in ([value] if isinstance(value, str) else value)]
        for name, value in names.items()
    }


FILES: dict[str, Names] = {
    "sd1": _rows("lora_unet_", "unet", _SD1_UNET) | _rows("lora_te_", "text_encoder", _CLIP),
    "sdxl": _rows("lora_unet_", "unet", _SDXL_UNET)
    | _rows("lora_te1_", "text_encoder", _CLIP)
    | _rows("lora_te2_", "text_encoder_2", _CLIP),
    "flux": _rows("lora_unet_", "transformer", {**_FLUX, **_FLUX_OUTSIDE})
    | _rows("lora_te1_", "text_encoder", _CLIP),
    "sd3": _rows("lora_unet_", "transformer", _SD3)
    | _rows("lora_te1_", "text_encoder", _CLIP)
    | _rows("lora_te2_", "text_encoder_2", _CLIP),
}


ALPHAS = (1.0, 3.0, 0.5, 4.0)


@dataclass(frozen=True)
class Trained:
    """A file and what it does to a pipeline.

    tensors: the file.  weights: the changed weights and biases, by "component:full name".
    """

    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]


def module_of(pipeline: Any, name: str) -> nn.Module:
    """The module "component:path" of a pipeline; newer text encoders lack the outermost module."""
    component, _, path = name.partition(":")
    model: nn.Module = getattr(pipeline, component)
    if not hasattr(model, "text_model"):
        path = path.removeprefix("text_model.")
    return model.get_submodule(path)


def train(
    pipeline: Any,
    names: Names,
    *,
    dora: bool = False,
    biases: bool = False,
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
) -> Trained:
    """A random kohya file for these modules; ranks and alphas differ from module to module."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    changed: dict[str, Tensor] = {}
    for number, (name, modules) in enumerate(names.items()):
        weight = _stacked(pipeline, modules, "weight", name)
        own = _random_lora(weight.shape, 2 + number % 3, alphas[number % len(alphas)], generator)
        up, down = own["lora_up.weight"].flatten(1), own["lora_down.weight"].flatten(1)
        weight = weight + float(own["alpha"]) / len(down) * (up @ down).reshape(weight.shape)
        if dora:
            lengths = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
            own["dora_scale"] = torch.rand(lengths.shape, generator=generator) + 0.5
            weight = weight * own["dora_scale"] / lengths
        changed |= _parted(pipeline, modules, "weight", name, weight)
        if biases:
            bias = _stacked(pipeline, modules, "bias", name)
            own["diff_b"] = torch.randn(bias.shape, generator=generator)
            changed |= _parted(pipeline, modules, "bias", name, bias + own["diff_b"])
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in own.items()}
    return Trained(tensors, changed)


def _random_lora(shape: torch.Size, rank: int, alpha: float, generator: torch.Generator) -> dict[str, Tensor]:
    """For a weight of this shape; a convolution's kernel is down's."""
    ones = [1] * (len(shape) - 2)
    return {
        "lora_up.weight": torch.randn(shape[0], rank, *ones, generator=generator) * 0.3,
        "lora_down.weight": torch.randn(rank, *shape[1:], generator=generator) * 0.3,
        "alpha": torch.tensor(alpha),
    }


def _stacked(pipeline: Any, modules: Sequence[str], param: str, name: str) -> Tensor:
    """The modules' weights or biases as the one tensor that kohya's name stands for."""
    return torch.cat([_swapped(_param(pipeline, module, param), name) for module in modules])


def _parted(pipeline: Any, modules: Sequence[str], param: str, name: str, whole: Tensor) -> dict[str, Tensor]:
    """The other way round, by full name."""
    heights = [len(_param(pipeline, module, param)) for module in modules]
    parts = torch.split(whole, heights)
    return {f"{module}.{param}": _swapped(part, name) for module, part in zip(modules, parts, strict=True)}


def _param(pipeline: Any, module: str, param: str) -> Tensor:
    tensor = getattr(module_of(pipeline, module), param)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def _swapped(rows: Tensor, name: str) -> Tensor:
    """Halves change places; done twice, they are where they were."""
    return torch.cat(rows.chunk(2)[::-1]) if name in SWAPPED else rows.clone()


def canonical(component: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights by the names that all versions of a text encoder have in files."""
    front = "text_model." if _lacks_outer(component) else ""
    return ((f"{front}{name}", tensor) for name, tensor in weights.items())


def _lacks_outer(component: nn.Module) -> bool:
    return type(component).__name__.startswith("CLIPText") and not hasattr(component, "text_model")
