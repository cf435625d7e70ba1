"""The kinds of change an adapter can make to one weight, as facts: which roles each has.

A role is the name of one tensor of a change. It is our word (`up`, `w1_a`), never a file's
(`lora_up.weight`): layouts under formats/ say how each role is spelled. The classes that do the
mathematics are in `adapterkit.deltas`, one per kind, with fields named by these roles; this
table is apart so that a header can be understood without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What one kind of change is made of.

    name: ours, as in the layouts' tables.
    title: what people call it.
    required: sets of roles, one of which must be present in full.
    optional: roles that may come with it.
    rank: (role, axis) pairs, the first present one gives the rank.
    scales: whether alpha / rank multiplies the change (or the change is used as it stands).
    needs_base: whether the delta depends on the weight that is changed.
    """

    name: str
    title: str
    required: tuple[frozenset[str], ...]
    optional: frozenset[str] = frozenset()
    rank: tuple[tuple[str, int], ...] = ()
    scales: bool = False
    needs_base: bool = False

    @property
    def roles(self) -> frozenset[str]:
        return frozenset().union(self.optional, *self.required)


# These stand beside any kind and are not tensors of the change itself:
# alpha and scale set its scale, scalar multiplies it, magnitude makes it a DoRA.
MODIFIERS = frozenset({"alpha", "scale", "scalar", "magnitude"})


def _roles(*names: str) -> frozenset[str]:
    return frozenset(names)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("lora", "LoRA", (_roles("up", "down"),), _roles("mid"), (("down", 0),), scales=True),
        # LoRA of an embedding: PEFT keeps the factors the other way round and says so by name.
        Kind("embedding", "embedding LoRA", (_roles("up", "down"),), rank=(("down", 0),), scales=True),
        # The same names again; that the weight is one of many experts is in the configuration.
        Kind("experts", "LoRA of experts", (_roles("up", "down"),), scales=True),
        Kind(
            "loha",
            "LoHa",
            (_roles("w1_a", "w1_b", "w2_a", "w2_b"),),
            _roles("t1", "t2"),
            (("w1_b", 0),),
            scales=True,
        ),
        Kind(
            "lokr",
            "LoKr",
            (
                _roles("w1", "w2"),
                _roles("w1", "w2_a", "w2_b"),
                _roles("w1_a", "w1_b", "w2"),
                _roles("w1_a", "w1_b", "w2_a", "w2_b"),
            ),
            _roles("t2"),
            (("w2_b", 0), ("w1_b", 0)),
            scales=True,
        ),
        Kind("glora", "GLoRA", (_roles("a1", "a2", "b1", "b2"),), _roles("bm"), (("b2", 0),), True, True),
        Kind("oft", "OFT", (_roles("blocks"),), _roles("rescale"), needs_base=True),
        Kind("boft", "BOFT", (_roles("blocks"),), _roles("rescale"), needs_base=True),
        Kind("oft_input", "OFTv2", (_roles("blocks"),), _roles("scaled"), needs_base=True),
        # PEFT rotates an embedding the other way round.
        Kind("oft_embedding", "embedding OFTv2", (_roles("blocks"),), needs_base=True),
        Kind("boft_input", "BOFT (PEFT)", (_roles("blocks", "rescale"),), needs_base=True),
        Kind("ia3", "IA³", (_roles("vector"),), _roles("on_input"), needs_base=True),
        Kind("diff", "whole delta", (_roles("value"),)),
        Kind("set", "replacement", (_roles("value"),), needs_base=True),
        Kind("reshape", "base widened to a shape", (_roles("shape"),), needs_base=True),
        Kind(
            "adalora", "AdaLoRA", (_roles("up", "down", "e"),), _roles("ranknum"), (("down", 0),), scales=True
        ),
        Kind(
            "tlora", "T-LoRA", (_roles("p", "q", "lambda"),), rank=(("q", 0),), scales=True, needs_base=True
        ),
        Kind("vera", "VeRA", (_roles("b", "d"),), rank=(("d", 0),)),
        Kind("tokens", "replaced token rows", (_roles("rows"),), needs_base=True),
    )
}
