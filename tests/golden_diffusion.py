"""The golden files of diffusion models: Stable Diffusion in full width, FLUX.1 and SD 3 in 24 channels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import golden_kinds as kinds
from golden_kinds import Made, Numbers
from golden_writing import DIFFUSERS, KOHYA, LOKR, SCALE, Golden

DOWN, DOWN_ = "unet.down_blocks.0.", "lora_unet_down_blocks_0_"
ATTENTION, ATTENTION_ = f"{DOWN}attentions.0.", f"{DOWN_}attentions_0_"
BLOCK, BLOCK_ = f"{ATTENTION}transformer_blocks.0.", f"{ATTENTION_}transformer_blocks_0_"
TEXT, TEXT_ = (
    "text_encoder.text_model.encoder.layers.0.self_attn.",
    "lora_te_text_model_encoder_layers_0_self_attn_",
)


def sd1(what: str, *kind: str, suffix: str = ".safetensors") -> Golden:
    """A kohya file of Stable Diffusion 1.5 in full width; the text's 768 tell it from 2.x."""
    return Golden(what, "sd1", ["kohya"], list(kind), suffix=suffix)


def sd1_lora(suffix: str = ".safetensors") -> Golden:
    what = "LoRA of a linear layer, a convolution and the text encoder, as sd-scripts writes it"
    file = sd1(what + (", as a pickle" if suffix == ".pt" else ""), "lora", suffix=suffix)
    n = Numbers(1)
    file.metadata = {"ss_network_dim": "2", "ss_network_alpha": "1.0"} if suffix == ".safetensors" else {}
    file.add(f"{BLOCK_}attn1_to_q", kinds.lora(n, 320, 320, scale=SCALE), KOHYA, f"{BLOCK}attn1.to_q")
    file.add(f"{BLOCK_}attn2_to_k", kinds.lora(n, 320, 768, scale=SCALE), KOHYA, f"{BLOCK}attn2.to_k")
    file.add(f"{ATTENTION_}proj_in", kinds.lora(n, 320, 320, 1, 1, scale=SCALE), KOHYA, f"{ATTENTION}proj_in")
    file.add(f"{TEXT_}q_proj", kinds.lora(n, 768, 768, rank=1, scale=SCALE), KOHYA, f"{TEXT}q_proj")
    return file


def sd1_of(
    what: str,
    kind: str,
    *forms: tuple[str, str, Callable[[Numbers], Made]],
    spelled: Mapping[str, str] = KOHYA,
) -> Golden:
    """A file of one kind: each form on one module, (flattened and dotted name, what makes it)."""
    file, n = sd1(what, kind), Numbers(2)
    for flat, dotted, make in forms:
        file.add(DOWN_ + flat, make(n), spelled, DOWN + dotted)
    return file


Q, Q_ = "attentions.0.transformer_blocks.0.attn1.to_q", "attentions_0_transformer_blocks_0_attn1_to_q"
V, V_ = f"{Q[:-1]}v", f"{Q_[:-1]}v"
K2, K2_ = "attentions.0.transformer_blocks.0.attn2.to_k", "attentions_0_transformer_blocks_0_attn2_to_k"
CONV, CONV_ = "resnets.0.conv1", "resnets_0_conv1"
NORM, NORM_ = "attentions.0.norm", "attentions_0_norm"


def sd1_norms() -> Golden:
    file, n = sd1("changed norms beside a LoRA, as LyCORIS writes them", "lora", "diff"), Numbers(11)
    file.add(DOWN_ + K2_, kinds.lora(n, 320, 768, scale=SCALE), KOHYA, DOWN + K2)
    for param, suffix in (("weight", ".w_norm"), ("bias", ".b_norm")):
        value = n(320)
        file.tensors[DOWN_ + NORM_ + suffix] = value.astype("float16")
        file.note(f"{DOWN}{NORM}.{param}", value)
    return file


def sd1_old_diffusers() -> Golden:
    what = "attention processors, as diffusers 0.14 to 0.22 wrote them"
    file, n = Golden(what, "sd1", ["diffusers_2023"], ["lora"]), Numbers(12)
    spelled = {"up": "_lora.up.weight", "down": "_lora.down.weight"}
    for side, width in (("q", 320), ("k", 768)):
        native = f"{BLOCK}attn2.processor.to_{side}"
        file.add(native, kinds.lora(n, 320, width), spelled, f"{BLOCK}attn2.to_{side}")
    return file


def sd1_numbered() -> Golden:
    what = "modules by number, as cloneofsimo/lora wrote them"
    file, n = Golden(what, "sd1", ["cloneofsimo"], ["lora"], dtype="float32"), Numbers(13)
    for number, name, width in ((0, "attn1.to_q", 320), (6, "attn2.to_k", 768)):
        made = kinds.lora(n, 320, width, rank=1)
        file.add(f"unet:{number}", made, {"up": ":up", "down": ":down"}, BLOCK + name)
    return file


def sdxl_diffusers() -> Golden:
    what = "LoRA with an alpha pattern in its metadata, as diffusers writes it"
    file, n = Golden(what, "sdxl", ["diffusers"], ["lora"]), Numbers(14)
    front = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2."
    config = {
        "unet.r": 1,
        "unet.lora_alpha": 2,
        "unet.alpha_pattern": {"attn2.to_v": 3},
        "unet.use_rslora": False,
    }
    file.metadata = {"lora_adapter_metadata": json.dumps(config)}
    for side, width, scale in (("q", 640, 2.0), ("k", 2048, 2.0), ("v", 2048, 3.0)):
        made = kinds.lora(n, 640, width, rank=1, scale=scale)
        file.add(f"{front}to_{side}", made, DIFFUSERS, f"{front}to_{side}")
    return file


WIDE = 24
DOUBLE, SINGLE = "transformer.transformer_blocks.", "transformer.single_transformer_blocks."


def fused_rows(block: str) -> list[str]:
    return [f"{block}.attn.to_{side}" for side in "qkv"]


def flux(what: str, layout: str, *more: str) -> Golden:
    return Golden(what, "flux1", [layout], ["lora", *more])


def flux_fused(
    what: str, layout: str, front: str, dot: str, spelled: Mapping[str, str], seed: int, scale: float = 1.0
) -> Golden:
    """A double block's fused q, k and v, and a single block's with a part four times as tall."""
    file, n = flux(what, layout), Numbers(seed)
    double, single = (
        front + name.replace(".", dot) for name in ("double_blocks.0.img_attn.qkv", "single_blocks.3.linear1")
    )
    file.add(double, kinds.lora(n, 3 * WIDE, WIDE, scale=scale), spelled, *fused_rows(f"{DOUBLE}0"))
    parts: list[str | tuple[str, int]] = [*fused_rows(f"{SINGLE}3"), (f"{SINGLE}3.proj_mlp", 4)]
    file.add(single, kinds.lora(n, 7 * WIDE, WIDE, scale=scale), spelled, *parts)
    return file


def flux_all_kinds(layout: str, front: str, dot: str, seed: int) -> Golden:
    """The projection of one block after another, each changed by another kind."""
    n, spelled = Numbers(seed), dict(KOHYA)
    made: list[tuple[Made, Mapping[str, str]]] = [
        (kinds.lora(n, WIDE, WIDE, scale=SCALE), spelled),
        (kinds.loha(n, WIDE, WIDE, scale=SCALE), spelled),
        (kinds.lokr(n, WIDE, WIDE, second="factored", scale=SCALE), LOKR),
        (kinds.glora(n, WIDE, WIDE, scale=SCALE), spelled),
        (kinds.oft(n, WIDE, WIDE), spelled),
        (kinds.boft(n, WIDE, WIDE), spelled),
        (kinds.oft_of_columns(n, WIDE, WIDE), {"blocks": ".oft_R.weight"}),
        (kinds.ia3(n, WIDE, WIDE, on_input=False), spelled),
        (kinds.whole(n, WIDE, WIDE), spelled),
        (kinds.replacement(n, WIDE, WIDE), {"value": ".set_weight"}),
        (kinds.reshape(WIDE, WIDE), spelled),
        (kinds.tlora(n, WIDE, WIDE), spelled),
        (kinds.dora(n, kinds.lora(n, WIDE, WIDE, scale=SCALE), "out"), spelled),
    ]
    names = [
        "lora",
        "loha",
        "lokr",
        "glora",
        "oft",
        "boft",
        "oft_input",
        "ia3",
        "diff",
        "set",
        "reshape",
        "tlora",
    ]
    file = Golden(
        "every kind that such files can hold, one a block", "flux1", [layout], [*names, "magnitude"]
    )
    for block, (change, spelling) in enumerate(made):
        native = front + f"double_blocks.{block}.img_attn.proj".replace(".", dot)
        file.add(native, change, spelling, f"{DOUBLE}{block}.attn.to_out.0")
    bias = n(WIDE)
    file.tensors[front + "double_blocks.0.img_attn.proj".replace(".", dot) + ".diff_b"] = bias.astype(
        "float16"
    )
    file.note(f"{DOUBLE}0.attn.to_out.0.bias", bias)
    return file


def flux_diffusers(what: str, metadata: Mapping[str, str], made: Made, *more: str) -> Golden:
    file = flux(what, "diffusers", *more)
    file.metadata = dict(metadata)
    file.add(f"{DOUBLE}0.attn.to_q", made, DIFFUSERS, f"{DOUBLE}0.attn.to_q")
    return file


def flux_dora() -> Golden:
    n = Numbers(24)
    made = kinds.dora(n, kinds.lora(n, WIDE, WIDE), "out")
    flat = Made({**made.tensors, "magnitude": made.tensors["magnitude"].reshape(-1)}, made.delta, made.rank)
    config = {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.use_dora": True}
        )
    }
    file = flux_diffusers("DoRA, as diffusers writes it", config, flat)
    file.kinds = ["magnitude"]
    return file


def flux_biased() -> Golden:
    config = {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": 2, "transformer.lora_alpha": 1, "transformer.lora_bias": True}
        )
    }
    made = kinds.lora_with_bias(Numbers(25), WIDE, WIDE, scale=SCALE)
    return flux_diffusers(
        "a bias inside each LoRA, scaled with it, as diffusers writes it", config, made, "diff"
    )


def flux_control() -> Golden:
    file, n = flux("BFL's control LoRA: biases inside, and norms replaced", "bfl", "diff", "set"), Numbers(26)
    file.add(
        "double_blocks.0.img_attn.proj",
        kinds.lora_with_bias(n, WIDE, WIDE),
        DIFFUSERS,
        f"{DOUBLE}0.attn.to_out.0",
    )
    norm = kinds.replacement(n, 8)
    file.tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = norm.tensors["value"].astype("float16")
    file.note(f"{DOUBLE}0.attn.norm_q.weight", norm.delta)
    return file


def flux_numbered() -> Golden:
    file, n = flux("fused weights' parts by number, as OneTrainer's OMI form has them", "omi"), Numbers(27)
    for part, name in enumerate(fused_rows(f"{DOUBLE}0")):
        file.add(
            f"transformer.double_blocks.0.img_attn.qkv.{part}",
            kinds.lora(n, WIDE, WIDE, scale=SCALE),
            KOHYA,
            name,
        )
    return file


def flux_onetrainer() -> Golden:
    file, n = flux("OneTrainer's legacy form, T5 under the number 2", "kohya"), Numbers(28)
    file.add(
        "lora_transformer_transformer_blocks_0_attn_to_q",
        kinds.lora(n, WIDE, WIDE, scale=SCALE),
        KOHYA,
        f"{DOUBLE}0.attn.to_q",
    )
    name = "encoder.block.0.layer.0.SelfAttention.q"
    file.add(
        f"lora_te2_{name.replace('.', '_')}",
        kinds.lora(n, WIDE, WIDE, scale=SCALE),
        KOHYA,
        f"text_encoder_2.{name}",
    )
    return file


def flux_xlabs() -> Golden:
    file, n = flux("XLabs' attention processors", "xlabs"), Numbers(29)
    spelled = {"up": ".up.weight", "down": ".down.weight"}
    file.add(
        "double_blocks.0.processor.qkv_lora1",
        kinds.lora(n, 3 * WIDE, WIDE),
        spelled,
        *fused_rows(f"{DOUBLE}0"),
    )
    file.add(
        "double_blocks.0.processor.proj_lora1", kinds.lora(n, WIDE, WIDE), spelled, f"{DOUBLE}0.attn.to_out.0"
    )
    return file


def sd3_kohya() -> Golden:
    file, n = Golden("Stable Diffusion 3 as sd-scripts writes it", "sd3", ["kohya"], ["lora"]), Numbers(30)
    fused = kinds.lora(n, 3 * WIDE, WIDE, scale=SCALE)
    file.add("lora_unet_joint_blocks_0_x_block_attn_qkv", fused, KOHYA, *fused_rows(f"{DOUBLE}0"))
    file.add(
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        kinds.lora(n, WIDE, WIDE, scale=SCALE),
        KOHYA,
        f"{TEXT}q_proj",
    )
    return file


GOLDEN: dict[str, Callable[[], Golden]] = {
    "kohya_sd1_lora": sd1_lora,
    "kohya_sd1_lora_pickle": lambda: sd1_lora(".pt"),
    "kohya_sd1_core": lambda: sd1_of(
        "LoRA of a convolution with a core (Tucker)",
        "lora",
        (CONV_, CONV, lambda n: kinds.lora_with_core(n, 320, 320, 3, 3, scale=SCALE)),
        (K2_, K2, lambda n: kinds.lora(n, 320, 768, scale=SCALE)),
    ),
    "kohya_sd1_loha": lambda: sd1_of(
        "LoHa of linear layers, and of a convolution with cores",
        "loha",
        (K2_, K2, lambda n: kinds.loha(n, 320, 768, scale=SCALE)),
        (CONV_, CONV, lambda n: kinds.loha_with_core(n, 320, 320, 3, 3, scale=SCALE)),
    ),
    "kohya_sd1_lokr": lambda: sd1_of(
        "LoKr in four forms: neither half factored, both, one, and one with a core",
        "lokr",
        (V_, V, lambda n: kinds.lokr(n, 320, 320, sides=(20, 20))),
        (Q_, Q, lambda n: kinds.lokr(n, 320, 320, "factored", "factored", SCALE)),
        (K2_, K2, lambda n: kinds.lokr(n, 320, 768, second="factored", scale=SCALE)),
        (CONV_, CONV, lambda n: kinds.lokr_with_core(n, 320, 320, 3, 3, scale=SCALE)),
        spelled=LOKR,
    ),
    "kohya_sd1_glora": lambda: sd1_of(
        "GLoRA", "glora", (K2_, K2, lambda n: kinds.glora(n, 320, 768, scale=SCALE))
    ),
    "kohya_sd1_oft": lambda: sd1_of(
        "OFT, one module rescaled",
        "oft",
        (K2_, K2, lambda n: kinds.oft(n, 320, 768)),
        (Q_, Q, lambda n: kinds.oft(n, 320, 320, rescaled=True)),
    ),
    "kohya_sd1_boft": lambda: sd1_of(
        "BOFT of two stages", "boft", (K2_, K2, lambda n: kinds.boft(n, 320, 768))
    ),
    "kohya_sd1_ia3": lambda: sd1_of(
        "IA³ of inputs and of outputs",
        "ia3",
        (K2_, K2, lambda n: kinds.ia3(n, 320, 768, on_input=False)),
        (V_, V, lambda n: kinds.ia3(n, 320, 320, on_input=True)),
    ),
    "kohya_sd1_dora": lambda: sd1_of(
        "DoRA along the output and along the input",
        "magnitude",
        (K2_, K2, lambda n: kinds.dora(n, kinds.lora(n, 320, 768, scale=SCALE), "out")),
        (Q_, Q, lambda n: kinds.dora(n, kinds.lora(n, 320, 320, scale=SCALE), "in")),
    ),
    "kohya_sd1_norm": sd1_norms,
    "diffusers_2023_sd1_lora": sd1_old_diffusers,
    "cloneofsimo_sd1_lora": sd1_numbered,
    "diffusers_sdxl_lora": sdxl_diffusers,
    "kohya_flux_lora": lambda: flux_fused(
        "fused weights, as sd-scripts writes them", "kohya", "lora_unet_", "_", KOHYA, 20, scale=SCALE
    ),
    "comfyui_flux_lora": lambda: flux_fused(
        "fused weights under ComfyUI's prefix, PEFT's suffixes",
        "comfyui",
        "diffusion_model.",
        ".",
        DIFFUSERS,
        21,
    ),
    "comfyui_flux_kinds": lambda: flux_all_kinds("comfyui", "diffusion_model.", ".", 22),
    "omi_flux_kinds": lambda: flux_all_kinds("omi", "transformer.", ".", 23),
    "kohya_flux_kinds": lambda: flux_all_kinds("kohya", "lora_unet_", "_", 19),
    "omi_flux_lora": flux_numbered,
    "diffusers_flux_dora": flux_dora,
    "diffusers_flux_bias": flux_biased,
    "ai_toolkit_flux_lora": lambda: flux_diffusers(
        "diffusers' names without metadata, as ai-toolkit saves them", {}, kinds.lora(Numbers(31), WIDE, WIDE)
    ),
    "bfl_flux_control": flux_control,
    "onetrainer_flux_lora": flux_onetrainer,
    "xlabs_flux_lora": flux_xlabs,
    "kohya_sd3_lora": sd3_kohya,
}
