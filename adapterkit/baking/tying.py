"""Heads that have no numbers of their own: files keep the embedding only, and a model uses it for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.baking.effects import Effect
from adapterkit.checkpoint import Checkpoint
from adapterkit.deltas import Tokens, Whole
from adapterkit.deltas.tensors import same
from adapterkit.errors import Json
from adapterkit.specs.weights import weight_names
from adapterkit.stores.model_folder import CONFIG

TIED = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Tie:
    """embedding: the tensor that a head shares.  head: what the head's own tensor would be called."""

    embedding: str
    head: str


def tie_of(base: Checkpoint, component: str, width: int, head: str = "") -> Tie | None:
    """The embedding that stands for a head which the base does not have.

    width: of the head.  head: its module; "" for the usual one, if the configuration says that the model
    scores tokens.  Of several embeddings (tokens, places) the tallest is that of the tokens.
    """
    names = weight_names()
    config = _config(base, component)
    if not base.family.open or config.get(TIED) is False or (not head and not _scores_tokens(config)):
        return None
    found = {
        key: base.store.tensors[key].shape
        for key, each in base.held.items()
        if each.component == component and each.param == "weight" and names.is_embedding(each.row.native)
    }
    fitting = {key: shape[0] for key, shape in found.items() if shape[1:] == (width,)}
    if not fitting or any(names.is_head(each.row.native) for each in base.held.values()):
        return None
    embedding = max(fitting, key=lambda key: fitting[key])
    front = embedding[: embedding.rindex("/") + 1] if "/" in embedding else ""
    return Tie(embedding, f"{front}{head or names.lone_head}.weight")


def stay_together(embeddings: Sequence[Effect], heads: Sequence[Effect]) -> bool:
    """Whether a head is changed as its embedding is, so that one tensor serves both.

    Rows of tokens, and embeddings with more of them, are for both (peft v0.21.2
    tuners/trainable_tokens/model.py; transformers' resize_token_embeddings).
    """
    if heads:
        return len(heads) == len(embeddings) and all(map(_alike, heads, embeddings))
    return all(map(_is_for_both, embeddings))


def _is_for_both(effect: Effect) -> bool:
    tuners = effect.ingredient.adapter.tuners
    tuner = tuners.get(effect.place.component) or tuners.get("")
    if tuner is not None and tuner.flag("ensure_weight_tying"):
        return True
    change = effect.change
    return isinstance(change, Tokens) or (isinstance(change, Whole) and change.shape != effect.before)


def _alike(one: Effect, two: Effect) -> bool:
    first, second = one.change, two.change
    return (
        one.ingredient is two.ingredient
        and isinstance(first, Whole)
        and isinstance(second, Whole)
        and first.replaces
        and second.replaces
        and same(first.value, second.value)
    )


def _config(base: Checkpoint, component: str) -> dict[str, Json]:
    """The part of the configuration that speaks of the words."""
    sidecars = base.store.sidecars
    config = sidecars.get(f"{component}/{CONFIG}", sidecars.get(CONFIG))
    if not isinstance(config, dict):
        return {}
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _scores_tokens(config: dict[str, Json]) -> bool:
    # The ends of transformers' classes with a head over the words, of decoders.
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in named)
