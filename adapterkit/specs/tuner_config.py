"""PEFT's configuration, its meaning for a file tool: the scale of each module.

It stands in adapter_config.json beside a PEFT adapter, and in diffusers' metadata under
`lora_adapter_metadata`, each field with the component's name before it. The rules are PEFT's own
(src/peft/utils/other.py get_pattern_key, src/peft/tuners/lora/layer.py update_layer, v0.21.2).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from adapterkit.errors import Json
from adapterkit.specs.tuner_fields import require_fields

METADATA_KEY = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_CHANGES_THE_MEANING = (
    *("use_qalora", "use_bdlora", "kasa_config", "arrow_config"),
    *("alora_invocation_tokens", "layer_replication"),
)


@dataclass(frozen=True)
class TunerConfig:
    """One adapter's configuration, as read. `values` keeps every field."""

    values: Mapping[str, Json]

    @property
    def peft_type(self) -> str:
        return str(self.values.get("peft_type") or "LORA")

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.values.get(name, default))

    def number(self, name: str, default: int) -> int:
        """An integer field; `default` where it is absent or null."""
        value = self.values.get(name)
        return value if isinstance(value, int) else default

    def targets_parameter_of(self, module: str) -> bool:
        """Whether a parameter of `module`, not a layer, is what was tuned.

        Several parameters of one module are tuned by layers around each other, all below its name.
        """
        targets = cast(list[str], self.values.get("target_parameters") or [])
        owners = {target.rpartition(".")[0] for target in targets}
        return any(f".{owner}." in f".{module}." for owner in owners)

    def token_indices(self, module: str) -> tuple[int, ...] | None:
        """Which rows of the embedding `module` were trained, or None if the config does not say.

        One list is for the model's input embedding, a table has one for every name's end.
        """
        given = self.values.get("trainable_token_indices") or self.values.get("token_indices")
        if isinstance(given, dict):
            given = next((v for name, v in given.items() if f".{module}".endswith(f".{name}")), None)
        return tuple(int(cast(int, index)) for index in given) if isinstance(given, list) else None

    @property
    def needs_itself(self) -> str | None:
        """The field, if there is one, without which the tensors mean another change.

        Some initialisations subtract the initial product from the base, which PEFT does again on
        loading; some tensors are packed or apply to some inputs only.
        """
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
            return "init_lora_weights"
        return next((name for name in _CHANGES_THE_MEANING if self.values.get(name)), None)

    def alpha(self, module: str) -> float | None:
        """lora_alpha (alpha for LoHa and LoKr) of a module, or None if the config has none."""
        default = self.values.get("lora_alpha", self.values.get("alpha"))
        value = self._of_pattern("alpha_pattern", module, default)
        return None if value is None else float(value)

    def rank(self, module: str) -> int | None:
        value = self._of_pattern("rank_pattern", module, self.values.get("r"))
        return None if value is None else int(value)

    def scale(self, module: str, rank: int | None) -> float | None:
        """What multiplies up @ down, or None if the config does not say.

        rank: the rank of the stored factors; the config's own serves where the factors have none.
        """
        alpha = self.alpha(module)
        r = rank or self.rank(module)
        if alpha is None or not r:
            return None
        return alpha / math.sqrt(r) if self.flag("use_rslora") else alpha / r

    @cached_property
    def _patterns(self) -> dict[str, tuple[tuple[re.Pattern[str], float], ...]]:
        compiled = {}
        for name in ("alpha_pattern", "rank_pattern"):
            table = cast("dict[str, float | list[bool]]", self.values.get(name) or {})
            compiled[name] = tuple(
                # AdaLoRA's patterns say which of the ranks are left.
                (re.compile(rf"(.*\.)?({key})$"), sum(value) if isinstance(value, list) else value)
                for key, value in table.items()
            )
        return compiled

    def _of_pattern(self, name: str, module: str, default: Json) -> float | None:
        # PEFT takes the first key, in the order of the file, that matches at the name's end.
        for pattern, value in self._patterns[name]:
            if pattern.match(module):
                return value
        return cast("float | None", default)


def config_of(values: Mapping[str, Json], where: str) -> TunerConfig:
    """A configuration, its fields checked. `where` is what messages call it. Raises StoreError."""
    require_fields(values, where)
    return TunerConfig(values)


def from_metadata(document: Mapping[str, Json], component: str) -> TunerConfig | None:
    """The part of diffusers' metadata that concerns `component`; None if it has none."""
    front = f"{component}."
    values = {key[len(front) :]: value for key, value in document.items() if key.startswith(front)}
    return config_of(values, f"metadata `{METADATA_KEY}`, {component}") if values else None


@dataclass(frozen=True, slots=True)
class ModuleScale:
    """What a config must say of one module: rank (0 where its factors have none) and scale."""

    module: str
    rank: int
    scale: float


def config_fields(modules: Sequence[ModuleScale]) -> dict[str, Json]:
    """The fields r, lora_alpha, rank_pattern, alpha_pattern and target_modules for these modules.

    The commonest rank and alpha are the defaults, every other module has a pattern of its own.
    """
    ranks = [m.rank for m in modules if m.rank] or [1]
    rank = Counter(ranks).most_common(1)[0][0]
    modules = [replace(m, rank=m.rank or rank) for m in modules]
    alphas = {m.module: m.scale * m.rank for m in modules}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    names = list(alphas)
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_pattern(m.module, names): m.rank for m in modules if m.rank != rank},
        "alpha_pattern": {_pattern(n, names): _number(alphas[n]) for n in names if alphas[n] != alpha},
        "target_modules": cast(Json, names),
    }


def _pattern(module: str, names: Sequence[str]) -> str:
    """A key that PEFT matches with `module` and, among `names`, with no other.

    PEFT matches at the name's end, so `proj_out` would also match `blocks.0.proj_out`; the anchor
    is left away where it is not needed, since a text encoder's names may get a prefix.
    """
    shadows = any(name.endswith(f".{module}") for name in names) or "." not in module
    return f"^{re.escape(module)}" if shadows else re.escape(module)


def _number(value: float) -> int | float:
    # 8.0 is written 8, as PEFT and every reader's integer check expect; 29.3 stays.
    return int(value) if value.is_integer() else value
