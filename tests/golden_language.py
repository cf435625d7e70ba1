"""The golden files of language models: PEFT folders, as PEFT saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import golden_kinds as kinds
from golden_kinds import Made, Numbers
from golden_writing import LOKR, PEFT, Golden

LAYER = "model.layers.0."
FRONT = "base_model.model."


def llm(
    what: str,
    peft_type: str,
    made: Mapping[str, Made],
    kind: list[str],
    spelled: Mapping[str, str] = PEFT,
    **config: object,
) -> Golden:
    """A PEFT folder; `made` is by the module's own name."""
    file = Golden(what, "transformers", ["peft"], kind, dtype="float32")
    names = [name.rpartition(".")[2] for name in made]
    file.config = {
        "peft_type": peft_type,
        "base_model_name_or_path": "a/llama",
        "target_modules": names,
        **config,
    }
    for name, change in made.items():
        file.add(FRONT + name, change, spelled, f"model.{name}")
    return file


def llm_lora() -> Golden:
    n, q = Numbers(40, "float32"), f"{LAYER}self_attn.q_proj"
    file = llm(
        "LoRA with a bias, and a head trained whole",
        "LORA",
        {q: kinds.lora_with_bias(n, 32, 32, scale=3.0)},
        ["lora", "diff", "set"],
        r=2,
        lora_alpha=6,
        lora_bias=True,
        modules_to_save=["lm_head"],
    )
    file.add(f"{FRONT}lm_head", kinds.replacement(n, 12, 32), {"value": ".weight"}, "model.lm_head")
    return file


def llm_dora() -> Golden:
    n, down = Numbers(41, "float32"), f"{LAYER}mlp.down_proj"
    made = kinds.dora(n, kinds.lora(n, 32, 48, scale=1.0), "out")
    flat = Made({**made.tensors, "magnitude": made.tensors["magnitude"].reshape(-1)}, made.delta, made.rank)
    return llm("DoRA", "LORA", {down: flat}, ["magnitude"], r=2, lora_alpha=2, use_dora=True)


def llm_tokens() -> Golden:
    n, tokens = Numbers(42, "float32"), kinds.tokens(Numbers(43, "float32"), 12, 32, (3, 7))
    file = llm(
        "two trained tokens beside a LoRA",
        "LORA",
        {f"{LAYER}mlp.up_proj": kinds.lora(n, 48, 32, scale=0.5)},
        ["lora", "tokens"],
        r=2,
        lora_alpha=1,
        trainable_token_indices=[3, 7],
    )
    spelled = {"rows": ".token_adapter.trainable_tokens_delta"}
    file.add(f"{FRONT}model.embed_tokens", tokens, spelled, "model.model.embed_tokens")
    return file


def llm_vera() -> Golden:
    n = Numbers(44, "float32")
    a, b = n(3, 48), n(48, 3)
    made = {f"{LAYER}self_attn.q_proj": kinds.vera(n, 32, 48, a, b)}
    file = llm("VeRA: two random matrices shared by all modules", "VERA", made, ["vera"], r=3)
    file.tensors |= {"base_model.vera_A": a.astype("float32"), "base_model.vera_B": b.astype("float32")}
    return file


def llm_experts() -> Golden:
    made = {"model.layers.0.mlp.experts": kinds.experts(Numbers(45, "float32"), 3, 16, 24, scale=3.0)}
    spelled = {"a": ".lora_A.weight", "b": ".lora_B.weight"}
    return llm(
        "LoRA of a layer's stacked experts",
        "LORA",
        made,
        ["experts"],
        spelled,
        r=2,
        lora_alpha=6,
        target_parameters=["mlp.experts.down_proj"],
    )


def llm_embedding(kind: str) -> Golden:
    n, name = Numbers(46, "float32"), "model.embed_tokens"
    if kind == "embedding":
        spelled = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
        made = {name: kinds.embedding(n, 12, 32, scale=2.0)}
        return llm("LoRA of an embedding", "LORA", made, [kind], spelled, r=2, lora_alpha=4)
    spelled, made = (
        {"blocks": ".oft_embedding_R.weight"},
        {name: kinds.oft_of_columns(n, 12, 32, inverse=True)},
    )
    return llm(
        "OFT of an embedding", "OFT", made, [kind], spelled, r=0, oft_block_size=4, use_cayley_neumann=True
    )


def llm_of(
    what: str, peft_type: str, kind: str, made: Made, spelled: Mapping[str, str] = PEFT, **config: object
) -> Golden:
    return llm(what, peft_type, {f"{LAYER}self_attn.q_proj": made}, [kind], spelled, **config)


def llm_ia3() -> Golden:
    n = Numbers(47, "float32")
    made = {
        f"{LAYER}mlp.down_proj": kinds.ia3_factor(n, 32, 48, on_input=True),
        f"{LAYER}self_attn.k_proj": kinds.ia3_factor(n, 16, 32, on_input=False),
    }
    return llm(
        "IA³ of a module's inputs and of another's outputs",
        "IA3",
        made,
        ["ia3"],
        feedforward_modules=["down_proj"],
    )


GOLDEN: dict[str, Callable[[], Golden]] = {
    "peft_lora": llm_lora,
    "peft_dora": llm_dora,
    "peft_tokens": llm_tokens,
    "peft_vera": llm_vera,
    "peft_experts": llm_experts,
    "peft_embedding": lambda: llm_embedding("embedding"),
    "peft_oft_embedding": lambda: llm_embedding("oft_embedding"),
    "peft_ia3": llm_ia3,
    "peft_loha": lambda: llm_of(
        "LoHa", "LOHA", "loha", kinds.loha(Numbers(48, "float32"), 32, 32, scale=3.0), r=2, alpha=6
    ),
    "peft_lokr": lambda: llm_of(
        "LoKr, one half factored",
        "LOKR",
        "lokr",
        kinds.lokr(Numbers(49, "float32"), 32, 32, second="factored", scale=3.0),
        {k: v for k, v in LOKR.items() if k != "alpha"},
        r=2,
        alpha=6,
    ),
    "peft_oft": lambda: llm_of(
        "OFT",
        "OFT",
        "oft_input",
        kinds.oft_of_columns(Numbers(50, "float32"), 32, 32),
        r=0,
        oft_block_size=4,
        use_cayley_neumann=True,
    ),
    "peft_boft": lambda: llm_of(
        "BOFT of one stage",
        "BOFT",
        "boft_input",
        kinds.boft_of_columns(Numbers(51, "float32"), 32, 32),
        {"blocks": ".boft_R", "rescale": ".boft_s"},
        boft_block_size=4,
        boft_n_butterfly_factor=1,
    ),
    "peft_adalora": lambda: llm_of(
        "AdaLoRA",
        "ADALORA",
        "adalora",
        kinds.adalora(Numbers(52, "float32"), 32, 32, scale=3.0),
        {"up": ".lora_B", "down": ".lora_A", "e": ".lora_E"},
        r=2,
        init_r=2,
        lora_alpha=6,
    ),
}
