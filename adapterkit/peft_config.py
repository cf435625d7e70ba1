"""PEFT's configuration of a written adapter: adapter_config.json, and diffusers' metadata.

PEFT builds its layers from the configuration before it loads the tensors, so it must name exactly
the modules that the file has and give them the shapes that they have there (huggingface/peft
v0.21.2, src/peft/tuners/tuners_utils.py check_target_module_exists and each tuner's layer.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

from adapterkit import peft_factors
from adapterkit.deltas import Change, InputButterfly, InputRotation, Magnitude
from adapterkit.errors import Json, Unrepresentable
from adapterkit.plan import Module, Plan
from adapterkit.specs.tuner_config import METADATA_KEY, ModuleScale, TunerConfig, config_fields

_TYPES = {
    "lora": "LORA",
    "embedding": "LORA",
    "experts": "LORA",
    "loha": "LOHA",
    "lokr": "LOKR",
    "ia3": "IA3",
    "oft_input": "OFT",
    "oft_embedding": "OFT",
    "boft_input": "BOFT",
    "adalora": "ADALORA",
    "vera": "VERA",
    "tokens": "TRAINABLE_TOKENS",
}
# What their configurations say beside names and scales (initial ranks, masks, indices) is not in the tensors.
_SAY_MORE = ("ADALORA", "VERA", "TRAINABLE_TOKENS")
# Fields that say nothing of the tensors, so that they hold for any adapter of the same base.
_OF_THE_BASE = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "fan_in_fan_out")
# Fields that choose modules or scales, all of which are written out anew, module by module.
_WRITTEN_OUT = ("use_rslora", "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")
# For these PEFT replaces the model's head on loading, whatever the configuration says, and fails on a
# file without one (v0.21.2, src/peft/peft_model.py, PeftModelForSequenceClassification and others).
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def component_config(plan: Plan, component: str) -> dict[str, Json]:
    """PEFT's configuration of one component of the output.

    One that came with the input is kept if it is still true of every module. Raises Unrepresentable
    for what no configuration of PEFT's can say.
    """
    modules = [module for module in plan.modules if module.component == component]
    peft_type = _peft_type(modules)
    old = _old(plan, component)
    if old is not None and old.peft_type == peft_type and _still_true(plan, modules, old):
        return dict(old.values)
    if any(module.kind == "experts" for module in modules):
        raise _experts_as_read()
    base: dict[str, Json] = {}
    if peft_type in _SAY_MORE and not (old and old.peft_type == peft_type and _same_scales(modules, old)):
        raise _not_without_its_own(peft_type)
    with_tokens = peft_type == "LORA" and any(module.kind == "tokens" for module in modules)
    if with_tokens and not (old and old.values.get("trainable_token_indices")):
        raise _not_without_its_own("TRAINABLE_TOKENS")
    if old is not None:
        if old.needs_itself is not None:
            raise _not_rewritten(old.needs_itself)
        kept = _OF_THE_BASE if old.peft_type != peft_type else set(old.values) - set(_WRITTEN_OUT)
        base = {name: value for name, value in old.values.items() if name in kept}
        if isinstance(masks := base.get("rank_pattern"), dict) and peft_type == "ADALORA":
            # PEFT prunes every module named here, and fails on one that is not there.
            paths = [f".{module.path}." for module in modules]
            base["rank_pattern"] = {k: v for k, v in masks.items() if any(p in f".{k}" for p in paths)}
    fields = _fields(plan, modules, peft_type)
    if base.get("task_type") in _WITH_HEAD and "modules_to_save" not in fields:
        base["task_type"] = None
    return {**base, "peft_type": peft_type, "inference_mode": True, **fields}


def _old(plan: Plan, component: str) -> TunerConfig | None:
    """The configuration that came with the input, if it is from a place like the output's."""
    inside = plan.target.scale == METADATA_KEY
    if inside and METADATA_KEY not in plan.adapter.metadata:
        # diffusers takes LoraConfig's fields only, and of its own PEFT's version.
        return None
    return plan.adapter.tuners.get(component) or plan.adapter.tuners.get("")


def _still_true(plan: Plan, modules: Sequence[Module], old: TunerConfig) -> bool:
    """Whether the output has the input's modules, all of them, under their names and with their scales."""
    if plan.adapter.computed or any(s.place.component == modules[0].component for s in plan.lost):
        return False
    scales = [m.scale for m in modules if m.scale is not None]
    # AdaLoRA's ranks change while it trains; its configuration says what was pruned.
    same_ranks = old.peft_type == "ADALORA" or all(m.rank in (0, old.rank(m.module)) for m in scales)
    as_read = all(_is_as_read(plan, module) for module in modules)
    return same_ranks and as_read and _same_scales(modules, old)


def _same_scales(modules: Sequence[Module], old: TunerConfig) -> bool:
    scales = [m.scale for m in modules if m.scale is not None]
    return all(old.scale(m.module, m.rank) == m.scale for m in scales)


def _is_as_read(plan: Plan, module: Module) -> bool:
    source = module.cut.parts[0].source
    if source is None or not module.cut.renames:
        return False
    return f".{plan.adapter.natives.get(source.place, '')}".endswith(f".{module.path}")


def _not_rewritten(field: str) -> Unrepresentable:
    return Unrepresentable(
        f"the adapter is for a base that its configuration changes (`{field}`), which only PEFT's own "
        "configuration can say",
        code="config-needed",
        hint="convert to peft without changing names, kinds or scales",
        details={"field": field},
    )


def _not_without_its_own(peft_type: str) -> Unrepresentable:
    return Unrepresentable(
        f"a configuration of {peft_type} cannot be made from the tensors alone, nor for other scales",
        code="config-needed",
        hint="give the folder with its configuration and leave the scale; --as lora needs no such thing",
        details={"type": peft_type},
    )


def _experts_as_read() -> Unrepresentable:
    return Unrepresentable(
        "LoRA of stacked experts can be written for PEFT only as it was read: all of it, with its ranks "
        "and scales",
        code="config-needed",
        hint="give the folder with its configuration and change nothing; `bake` takes it at any strength",
        details={"type": "LORA"},
    )


def _peft_type(modules: Iterable[Module]) -> str:
    types = {_TYPES[m.kind] for m in modules if m.kind in _TYPES}
    # Token rows come with a LoRA of other modules, too.
    if types == {"LORA", "TRAINABLE_TOKENS"}:
        return "LORA"
    if len(types) > 1:
        raise Unrepresentable(
            f"one PEFT adapter cannot mix {' and '.join(sorted(types))}",
            code="two-kinds",
            hint="--as lora expands them to one kind",
        )
    if not types:
        raise Unrepresentable(
            "nothing in it is a kind of change that PEFT has", code="no-tuner", hint="another format keeps it"
        )
    return types.pop()


def _fields(plan: Plan, modules: Sequence[Module], peft_type: str) -> dict[str, Json]:
    tuned = [m for m in modules if _TYPES.get(m.kind) == peft_type and m.kind != "experts"]
    fields: dict[str, Json] = {"target_modules": _targets(plan, tuned)}
    if saved := _saved(plan, modules):
        fields["modules_to_save"] = saved
    _refuse_magnitudes(tuned, peft_type)
    scales = [_named(plan, m) for m in tuned]
    match peft_type:
        case "LORA":
            return {**config_fields(scales), **fields, **_lora_fields(modules)}
        case "LOHA" | "LOKR":
            changes = [_change(m) for m in tuned]
            factors = peft_factors.loha_fields(changes) if peft_type == "LOHA" else {}
            if peft_type == "LOKR":
                factors, ranks = peft_factors.lokr_fields(changes)
                scales = [replace(scale, rank=rank) for scale, rank in zip(scales, ranks, strict=True)]
            general = config_fields(scales)
            return {"alpha": general.pop("lora_alpha"), **general, **fields, **factors}
        case "IA3":
            return {**fields, "feedforward_modules": _feedforward(tuned)}
        case "OFT":
            return {**fields, **_rotation_fields([_change(m) for m in tuned])}
        case "BOFT":
            return {**fields, **_butterfly_fields([_change(m) for m in tuned])}
        case _:
            return fields


def _change(module: Module) -> Change:
    change = module.cut.make()
    assert change is not None
    return change


def _names(plan: Plan, module: Module) -> list[str]:
    """The module's name without its prefix, and the ends of it that other namings have, shortest first.

    A text encoder's names are written with the outer module's name, which newer models lack. PEFT
    matches the ends of names, so the shortest serves both.
    """
    written = plan.target.prefixes[module.component]
    names = [module.path]
    for prefix in plan.adapter.family.spelling[plan.target.layout]:
        if prefix.text == written.text and prefix.component == module.component:
            row = plan.adapter.family.names(module.component, prefix.naming).at(module.cut.row.span, "weight")
            if row is not None and module.path.endswith(f".{row.native}"):
                names.append(row.native)
    return sorted(set(names), key=len)


def _named(plan: Plan, module: Module) -> ModuleScale:
    scale = module.scale or ModuleScale(module.path, 0, 1.0)
    return replace(scale, module=_names(plan, module)[0])


def _targets(plan: Plan, tuned: Sequence[Module]) -> Json:
    """The modules by name; by one regular expression if a name would also mean modules the file has not."""
    if not tuned:
        return []
    shortest = [_names(plan, module)[0] for module in tuned]
    if not _means_more(plan, tuned, set(shortest)):
        return cast(Json, list(dict.fromkeys(shortest)))
    spelled = [re.escape(name) for module in tuned for name in _names(plan, module)]
    return f"({'|'.join(dict.fromkeys(spelled))})"


def _means_more(plan: Plan, tuned: Sequence[Module], names: set[str]) -> bool:
    """Whether PEFT, which looks at the end of names, would find another module of the model by these."""
    component = tuned[0].component
    if plan.adapter.family.network(component) is None:
        return any("." not in name for name in names)
    ours = {module.path for module in tuned}
    others = _modules_of(plan, component) - ours
    return any(not names.isdisjoint(_ends(other)) for other in others)


def _modules_of(plan: Plan, component: str) -> set[str]:
    """Every module of a known model, by the output's names."""
    network = plan.adapter.family.network(component)
    if network is None:
        return set()
    rows = network.namings[plan.target.prefixes[component].naming].rows
    return {row.native for row in rows if row.param is None}


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _saved(plan: Plan, modules: Sequence[Module]) -> list[Json]:
    """modules_to_save: those whose tensors are replaced as a whole.

    PEFT looks at the end of names here without regard to dots and wants all tensors of each.
    """
    saved = dict.fromkeys(
        m.path for m in modules if m.kind == "set" and m.site.param == "weight" and not m.site.wrapped
    )
    if not saved:
        return []
    known = _modules_of(plan, modules[0].component)
    extra = {name for name in known if name.endswith(tuple(saved))} - set(saved)
    if extra:
        raise Unrepresentable(
            f"PEFT would also want the tensors of `{min(extra)}` for `modules_to_save`",
            code="modules-to-save",
            hint="another format keeps the replaced tensors",
        )
    return list[Json](saved)


def _lora_fields(modules: Sequence[Module]) -> dict[str, Json]:
    lora = [m for m in modules if _TYPES.get(m.kind) == "LORA"]
    replaced = [m for m in modules if m.kind == "set" and m.site.param == "bias"]
    trains_all = any(not m.site.wrapped for m in replaced)
    return {
        "use_dora": _all_or_none(lora),
        "lora_bias": any(m.kind == "diff" and m.site.param == "bias" for m in modules),
        "bias": "all" if trains_all else "lora_only" if replaced else "none",
    }


def _all_or_none(lora: Sequence[Module]) -> bool:
    having = [m for m in lora if _has_magnitude(m)]
    if having and len(having) < len(lora):
        without = next(m for m in lora if not _has_magnitude(m))
        raise Unrepresentable(
            f"PEFT has DoRA for all modules or for none, and `{without.native}` has no magnitude",
            code="partial-dora",
            hint="kohya and ComfyUI files can say it",
            details={"modules": [m.native for m in lora if not _has_magnitude(m)]},
        )
    return bool(having)


def _has_magnitude(module: Module) -> bool:
    return any(part.source and isinstance(part.source.change, Magnitude) for part in module.cut.parts)


def _refuse_magnitudes(tuned: Sequence[Module], peft_type: str) -> None:
    for module in tuned:
        if peft_type != "LORA" and _has_magnitude(module):
            raise Unrepresentable(
                f"PEFT has DoRA over LoRA only (`{module.native}`)",
                code="magnitude-kind",
                hint="--as lora expands what is under the magnitudes exactly",
            )


def _feedforward(tuned: Sequence[Module]) -> Json:
    """The modules whose input is scaled. PEFT looks at the end of names without regard to dots."""
    on_input = [m.path for m in tuned if getattr(_change(m), "on_input", False)]
    others = [m.path for m in tuned if m.path not in set(on_input)]
    if on_input and any(other.endswith(tuple(on_input)) for other in others):
        return f"({'|'.join(map(re.escape, on_input))})$"
    return cast(Json, on_input)


def _rotation_fields(changes: Sequence[Change]) -> dict[str, Json]:
    rotations = [change for change in changes if isinstance(change, InputRotation)]
    return {
        # The series is the one that PEFT sums since this version; older files warn.
        "peft_version": "0.18.0",
        "r": 0,
        "oft_block_size": _same([c.block_size for c in rotations], "block sizes"),
        "block_share": _same([c.block_share for c in rotations], "shared blocks"),
        "use_cayley_neumann": _same([c.cayley_neumann for c in rotations], "series"),
        "num_cayley_neumann_terms": _same([c.terms for c in rotations], "series"),
    }


def _butterfly_fields(changes: Sequence[Change]) -> dict[str, Json]:
    butterflies = [change for change in changes if isinstance(change, InputButterfly)]
    return {
        "boft_block_size": _same([c.blocks.shape[-1] for c in butterflies], "block sizes"),
        "boft_block_num": 0,
        "boft_n_butterfly_factor": _same([c.blocks.shape[0] for c in butterflies], "stages"),
    }


def _same(values: Sequence[int], what: str) -> int:
    counted = Counter(values)
    if len(counted) > 1:
        raise Unrepresentable(
            f"one PEFT adapter has one kind of {what}, not {sorted(counted)}",
            code="config-mixed",
            hint="another format keeps them apart",
        )
    return next(iter(counted))
