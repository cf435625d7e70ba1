"""The names of fused weights, written out by hand: which rows of which tensor each part is, by format.

Nothing here comes from the tables under formats/; the tests of re-cutting hold those to this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# canonical part -> (module in this format, first row, end), in units of H rows; some are in two runs.

Rows = tuple[str, tuple[tuple[int, int], ...]]


def all_of(module: str, height: int = 1) -> Rows:
    return module, ((0, height),)


def part(module: str, number: int) -> Rows:
    return module, ((number, number + 1),)


FLUX_PARTS = {
    **dict.fromkeys(("q", "k", "v", "tq", "tk", "tv", "sq", "sk", "sv", "proj"), 1),
    "smlp": 4,
    "out": 2,
}
FLUX_FUSED = {
    **{name: part("double_blocks.18.img_attn.qkv", n) for n, name in enumerate(("q", "k", "v"))},
    **{name: part("double_blocks.18.txt_attn.qkv", n) for n, name in enumerate(("tq", "tk", "tv"))},
    **{name: part("single_blocks.37.linear1", n) for n, name in enumerate(("sq", "sk", "sv"))},
    "smlp": ("single_blocks.37.linear1", ((3, 7),)),
    "proj": all_of("double_blocks.18.img_attn.proj"),
    # bfl has shift before scale, diffusers the other way round.
    "out": ("final_layer.adaLN_modulation.1", ((1, 2), (0, 1))),
}
FLUX_APART = {
    "q": all_of("transformer_blocks.18.attn.to_q"),
    "k": all_of("transformer_blocks.18.attn.to_k"),
    "v": all_of("transformer_blocks.18.attn.to_v"),
    "tq": all_of("transformer_blocks.18.attn.add_q_proj"),
    "tk": all_of("transformer_blocks.18.attn.add_k_proj"),
    "tv": all_of("transformer_blocks.18.attn.add_v_proj"),
    "sq": all_of("single_transformer_blocks.37.attn.to_q"),
    "sk": all_of("single_transformer_blocks.37.attn.to_k"),
    "sv": all_of("single_transformer_blocks.37.attn.to_v"),
    "smlp": all_of("single_transformer_blocks.37.proj_mlp", 4),
    "proj": all_of("transformer_blocks.18.attn.to_out.0"),
    "out": all_of("norm_out.linear", 2),
}
FLUX_NUMBERED = {
    **{name: all_of(f"double_blocks.18.img_attn.qkv.{n}") for n, name in enumerate(("q", "k", "v"))},
    **{name: all_of(f"double_blocks.18.txt_attn.qkv.{n}") for n, name in enumerate(("tq", "tk", "tv"))},
    **{name: all_of(f"single_blocks.37.linear1.{n}") for n, name in enumerate(("sq", "sk", "sv"))},
    "smlp": all_of("single_blocks.37.linear1.3", 4),
    "proj": FLUX_FUSED["proj"],
    "out": FLUX_FUSED["out"],
}

# Block 23 is the last of Stable Diffusion 3 medium: its context has but two modulations, swapped.
SD3_PARTS = {**dict.fromkeys(("q", "k", "v", "cq", "ck", "cv", "proj"), 1), "first": 6, "last": 2, "out": 2}
SD3_FUSED = {
    **{name: part("joint_blocks.23.x_block.attn.qkv", n) for n, name in enumerate(("q", "k", "v"))},
    **{name: part("joint_blocks.23.context_block.attn.qkv", n) for n, name in enumerate(("cq", "ck", "cv"))},
    "proj": all_of("joint_blocks.23.x_block.attn.proj"),
    "first": all_of("joint_blocks.0.context_block.adaLN_modulation.1", 6),
    "last": ("joint_blocks.23.context_block.adaLN_modulation.1", ((1, 2), (0, 1))),
    "out": ("final_layer.adaLN_modulation.1", ((1, 2), (0, 1))),
}
SD3_APART = {
    "q": all_of("transformer_blocks.23.attn.to_q"),
    "k": all_of("transformer_blocks.23.attn.to_k"),
    "v": all_of("transformer_blocks.23.attn.to_v"),
    "cq": all_of("transformer_blocks.23.attn.add_q_proj"),
    "ck": all_of("transformer_blocks.23.attn.add_k_proj"),
    "cv": all_of("transformer_blocks.23.attn.add_v_proj"),
    "proj": all_of("transformer_blocks.23.attn.to_out.0"),
    "first": all_of("transformer_blocks.0.norm1_context.linear", 6),
    "last": all_of("transformer_blocks.23.norm1_context.linear", 2),
    "out": all_of("norm_out.linear", 2),
}
SD3_NUMBERED = {
    **SD3_FUSED,
    **{name: all_of(f"joint_blocks.23.x_block.attn.qkv.{n}") for n, name in enumerate(("q", "k", "v"))},
    **{
        name: all_of(f"joint_blocks.23.context_block.attn.qkv.{n}")
        for n, name in enumerate(("cq", "ck", "cv"))
    },
}


@dataclass(frozen=True)
class Format:
    """prefix and dot: how module names are written.  names: which rows each part has.

    up, down: the suffixes.  alpha: whether one stands beside each module.
    """

    prefix: str
    names: Mapping[str, Rows]
    up: str = ".lora_up.weight"
    down: str = ".lora_down.weight"
    dot: str = "."
    alpha: bool = True

    def stem(self, module: str) -> str:
        return self.prefix + module.replace(".", self.dot)


AB = {"up": ".lora_B.weight", "down": ".lora_A.weight", "alpha": False}


def formats(
    fused: Mapping[str, Rows], apart: Mapping[str, Rows], numbered: Mapping[str, Rows]
) -> dict[str, Format]:
    return {
        "kohya": Format("lora_unet_", fused, dot="_"),
        "comfyui": Format("diffusion_model.", fused),
        "omi": Format("transformer.", numbered),
        "onetrainer": Format("lora_transformer_", apart, dot="_"),
        "lycoris": Format("lycoris_", apart, dot="_"),
        "diffusers": Format("transformer.", apart, **AB),
        "peft": Format("base_model.model.", apart, **AB),
        "ai-toolkit": Format("transformer.", apart, **AB),
    }


FORMATS = {
    "flux1": {**formats(FLUX_FUSED, FLUX_APART, FLUX_NUMBERED), "bfl": Format("", FLUX_FUSED, **AB)},
    "SD 3 medium": formats(SD3_FUSED, SD3_APART, SD3_NUMBERED),
}
PARTS = {"flux1": FLUX_PARTS, "SD 3 medium": SD3_PARTS}
