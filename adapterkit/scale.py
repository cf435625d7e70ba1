"""The scale of each change: one function that owns every rule about alpha.

What multiplies up @ down can stand in six places, and the readers of the world disagree about
them. Here it is resolved once per change, with its source said in words; two sources that differ
are an error until the user says which holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from adapterkit.detect import Entry, Explanation
from adapterkit.errors import Conflict, Json, Mismatch, StoreError, located
from adapterkit.specs.kinds import KINDS
from adapterkit.specs.tuner_config import CONFIG_FILE, METADATA_KEY, TunerConfig, config_of, from_metadata
from adapterkit.stores import Store
from adapterkit.stores.guards import strict_json

ScaleFrom = Literal["alpha", "config"]

# A source may have been rounded to the file's dtype (bf16 keeps 8 bits of an alpha).
_SAME = 2.0**-8


@dataclass(frozen=True, slots=True)
class Scale:
    """value: what multiplies the change.  alpha: as the file gives it, if it does.  source: in words."""

    value: float
    alpha: float | None
    source: str


@dataclass(frozen=True)
class Configs:
    """The configuration that goes with each component of a file ("" for all), and what it is called."""

    by_component: Mapping[str, TunerConfig]
    name: str = METADATA_KEY

    def of(self, component: str) -> TunerConfig | None:
        return self.by_component.get(component) or self.by_component.get("")


def configs(store: Store, explanation: Explanation) -> Configs:
    """Read the configurations beside or inside a file; StoreError if one is malformed."""
    with located(store.label):
        return _beside_tensors(store) or _inside(store, explanation)


def _beside_tensors(store: Store) -> Configs | None:
    found = {}
    for name, value in store.sidecars.items():
        component, _, file = name.rpartition("/")
        if file == CONFIG_FILE and isinstance(value, dict):
            found[component] = config_of(value, name)
    return Configs(found, CONFIG_FILE) if found else None


def _inside(store: Store, explanation: Explanation) -> Configs:
    text = store.metadata.get(METADATA_KEY)
    if not text:
        return Configs({})
    document = _metadata_document(text)
    parts = {name: from_metadata(document, name) for name in explanation.family.components}
    return Configs({name: config for name, config in parts.items() if config is not None})


def _metadata_document(text: str) -> dict[str, Json]:
    where = f"metadata `{METADATA_KEY}`"
    hint = "get the file again; without it the scales are not known"
    try:
        document = strict_json(text.encode(), where)
    except StoreError as error:
        raise StoreError(error.message, code="bad-config", hint=hint) from None
    if not isinstance(document, dict):
        raise StoreError(f"{where}: not a JSON object", code="bad-config", hint=hint)
    return document


def with_experts(entry: Entry, store: Store, found: Configs) -> Entry:
    """The entry, of its true kind where only the configuration tells that its weight is many."""
    return replace(entry, kind="experts") if expert_count(entry, store, found) > 1 else entry


def expert_count(entry: Entry, store: Store, found: Configs) -> int:
    """How many experts the factors of a LoRA are for; 1 where its weight is no stack of weights."""
    config = found.of(entry.place.component)
    rank = config.rank(entry.path) if config is not None else None
    if entry.kind not in ("lora", "experts") or config is None or not rank:
        return 1
    if not config.targets_parameter_of(entry.path):
        return 1
    shape = store.tensors[entry.roles["down"].key].shape
    return shape[0] // rank if shape else 1


def rank_of(entry: Entry, store: Store) -> int | None:
    """The rank of a change from the shapes of its factors; None for kinds and forms without one."""
    for name, axis in KINDS[entry.kind].rank:
        if (role := entry.roles.get(name)) is not None:
            shape = store.tensors[role.key].shape
            stored = role.spelling.axes.split().index("r") if role.spelling.axes else axis
            return shape[stored] if stored < len(shape) else None
    return None


def scale_of(entry: Entry, store: Store, found: Configs, scale_from: ScaleFrom | None = None) -> Scale:
    """The scale of one change.

    scale_from: which source holds when the tensor beside the module and the config disagree.
    Raises Conflict if they do and it is None.
    """
    if not KINDS[entry.kind].scales:
        return Scale(1.0, None, "none: this kind has no scale")
    rank = rank_of(entry, store)
    config = found.of(entry.place.component)
    candidates: dict[ScaleFrom, Scale] = {}
    if (own := _beside(entry, store, rank)) is not None:
        candidates["alpha"] = own
    if config is not None and (value := config.scale(entry.path, rank)) is not None:
        if scale_from != "alpha" or own is None:
            _require_rank(entry, store, config, rank, found.name)
        candidates["config"] = Scale(value, config.alpha(entry.path), found.name)
    scale = _one_of(entry, store, candidates, scale_from)
    if (role := entry.modifiers.get("scalar")) is not None:
        factor = one_number(store, role.key)
        return Scale(scale.value * factor, scale.alpha, f"{scale.source}, times `.scalar`")
    return scale


def _require_rank(entry: Entry, store: Store, config: TunerConfig, rank: int | None, name: str) -> None:
    """Conflict if the factors have another rank than the config says: its alpha was meant for that one."""
    said = config.rank(entry.path)
    if entry.kind != "lora" or not rank or not said or rank == said:
        return
    if config.targets_parameter_of(entry.path):
        # The factors of all experts stand side by side.
        return
    raise Conflict(
        f"{store.label}: `{entry.native}`: its factors have rank {rank}, {name} says {said}",
        code="rank-conflict",
        hint=f"correct the rank in {name}; what builds layers from it cannot load these factors",
        details={"module": entry.native, "rank": rank, "config": said},
    )


def _one_of(
    entry: Entry, store: Store, candidates: Mapping[ScaleFrom, Scale], scale_from: ScaleFrom | None
) -> Scale:
    if not candidates:
        return Scale(1.0, None, "none given")
    if scale_from is not None and scale_from in candidates:
        return candidates[scale_from]
    values = list(candidates.values())
    if len(values) == 2 and not math.isclose(values[0].value, values[1].value, rel_tol=_SAME):
        first, second = values
        raise Conflict(
            f"{store.label}: `{entry.native}`: scale {first.value:g} from {first.source}, "
            f"{second.value:g} from {second.source}",
            code="scale-conflict",
            hint="say which holds with --scale-from alpha or --scale-from config",
            details={"module": entry.native, "alpha": first.value, "config": second.value},
        )
    return values[0]


def _beside(entry: Entry, store: Store, rank: int | None) -> Scale | None:
    """The scale from a tensor beside the module: `.scale` itself, or `.alpha` by the rank."""
    if (role := entry.modifiers.get("scale")) is not None:
        return Scale(one_number(store, role.key), None, "`.scale`")
    if (role := entry.modifiers.get("alpha")) is None:
        return None
    alpha = one_number(store, role.key)
    if rank == 0:
        raise Mismatch(
            f"{store.label}: `{entry.native}`: its factors have rank 0, so its alpha means nothing",
            hint="the file is damaged; get it again",
        )
    if rank is None:
        # LyCORIS ignores alpha when neither factor of a LoKr is decomposed.
        return Scale(1.0, alpha, "`.alpha` does not apply to undecomposed factors")
    if alpha == 0 and _zero_means_rank(store.metadata):
        return Scale(1.0, alpha, "`.alpha` 0, which the trainer takes for the rank")
    divisor = math.sqrt(rank) if _rank_stabilised(entry, store.metadata) else rank
    return Scale(alpha / divisor, alpha, "`.alpha`")


def one_number(store: Store, key: str) -> float:
    """The one number of a tensor; StoreError for several, or one that is not finite."""
    value = store.scalar(key)
    if (count := store.tensors[key].elements) > 1:
        raise StoreError(f"{store.label}: `{key}` holds {count} numbers where one is meant", code="bad-alpha")
    if not math.isfinite(value):
        raise StoreError(f"{store.label}: `{key}` is {value}", code="bad-alpha")
    return value


def _zero_means_rank(metadata: Mapping[str, str]) -> bool:
    # sd-scripts and LyCORIS take alpha 0 or None for the rank when they build the modules.
    return metadata.get("ss_network_alpha") in {"0", "0.0", "None"}


def _rank_stabilised(entry: Entry, metadata: Mapping[str, str]) -> bool:
    # LyCORIS stores alpha times sqrt(rank) for every kind but GLoRA, where it stores alpha itself.
    if entry.kind != "glora":
        return False
    given = network_arguments(metadata).get("rs_lora", False)
    # sd-scripts keeps arguments as the texts they were given as, and LyCORIS takes all but "false" for yes.
    return str(given).lower() != "false"


def network_arguments(metadata: Mapping[str, str]) -> dict[str, Json]:
    """kohya's `ss_network_args`; none if they are not there or cannot be read."""
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}
