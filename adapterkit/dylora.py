"""DyLoRA: a LoRA trained so that its first ranks are a LoRA of their own (arXiv:2210.07558)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from adapterkit.errors import Unrepresentable, UsageError
from adapterkit.scale import network_arguments

if TYPE_CHECKING:
    from adapterkit.deltas import Change

TrainedBy = Literal["kohya", "lycoris", "other"]


def trained_by(metadata: Mapping[str, str]) -> TrainedBy:
    """Which trainer's DyLoRA a file is; UsageError where its metadata does not say."""
    module = metadata.get("ss_network_module", "")
    if module.endswith(".dylora"):
        return "kohya"
    if module.startswith("lycoris") and network_arguments(metadata).get("algo") == "dylora":
        return "lycoris"
    raise UsageError(
        "the file does not say that it is a DyLoRA, whose first ranks mean something by themselves",
        code="no-dylora",
        hint="--trained-by kohya or lycoris says so; `resize --rank` makes the best of any other LoRA",
    )


def first_ranks(change: Change, count: int, by: TrainedBy) -> Change:
    """The first `count` ranks of a LoRA at the strength at which they were trained; a view of its factors.

    With the first n of d ranks sd-scripts multiplies by alpha / d · √(d / n) while it trains
    (networks/dylora.py: forward), LyCORIS by alpha over the number of blocks in use, so by d / n of what
    all of them get (lycoris/modules/dylora.py: get_weight). `other` leaves the scale as it is.
    A change without ranks, or with no more of them, is left as it is. Raises Unrepresentable for the
    first ranks of other kinds than LoRA.
    """
    from adapterkit.deltas import LowRank, Whole

    if isinstance(change, Whole):
        return change
    if not isinstance(change, LowRank) or change.mid is not None:
        raise Unrepresentable(
            f"the ranks of {change._title} have no order",
            code="first-ranks",
            hint="only LoRA is trained so; --drop leaves such modules out",
            details={"kind": change.kind},
        )
    if change.rank <= count:
        return change
    factor = {"kohya": math.sqrt(change.rank / count), "lycoris": change.rank / count, "other": 1.0}[by]
    return replace(change, up=change.up[:, :count], down=change.down[:count], scale=change.scale * factor)
