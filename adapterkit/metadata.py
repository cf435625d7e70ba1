"""What stands in the output's metadata and in the configuration beside it.

Metadata is carried. What a conversion makes untrue is made true again or left out: hashes of the
tensors, ranks and alphas, and the places where the scale stands.
"""

from __future__ import annotations

import json

from adapterkit.deltas import Magnitude
from adapterkit.errors import Json, Unrepresentable
from adapterkit.plan import Module, Plan
from adapterkit.specs.tuner_config import METADATA_KEY, ModuleScale, TunerConfig, config_fields
from adapterkit.stores import DATA_SHA256

# kohya's hash of a header that other metadata is not part of; it cannot be made again.
_NOT_RECOMPUTABLE = ("sshs_legacy_hash",)
_TENSOR_HASHES = ("sshs_model_hash", "modelspec.hash_sha256")
_PEFT_TYPES = {
    "lora": "LORA",
    "embedding": "LORA",
    "loha": "LOHA",
    "lokr": "LOKR",
    "ia3": "IA3",
    "oft_input": "OFT",
    "boft_input": "BOFT",
    "adalora": "ADALORA",
    "vera": "VERA",
}


def output_metadata(plan: Plan) -> dict[str, str]:
    """The metadata of the written file; hashes of its tensors are filled in by the writer."""
    metadata = {key: value for key, value in plan.adapter.metadata.items() if key not in _NOT_RECOMPUTABLE}
    metadata.pop(METADATA_KEY, None)
    metadata["format"] = "pt"
    for key in _TENSOR_HASHES:
        if key in metadata:
            # kohya writes the bare digits, ModelSpec and LyCORIS put 0x before them.
            metadata[key] = ("0x" if metadata[key].startswith("0x") else "") + DATA_SHA256
    _renew_ranks(metadata, plan)
    if plan.target.scale == "lora_adapter_metadata":
        metadata[METADATA_KEY] = json.dumps(_diffusers_config(plan), indent=2, sort_keys=True)
    return metadata


def _renew_ranks(metadata: dict[str, str], plan: Plan) -> None:
    """kohya's summary of ranks, where the file has one and it is no longer so."""
    ranks = {module.scale.rank for module in plan.modules if module.scale is not None}
    alphas = {module.scale.rank * module.scale.scale for module in plan.modules if module.scale is not None}
    for key, values in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        if key in metadata and values and not _says(metadata[key], values):
            metadata[key] = f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"


def _says(text: str, values: set[int] | set[float]) -> bool:
    try:
        return float(text) in values
    except ValueError:
        return text == "Dynamic" and len(values) > 1


def _diffusers_config(plan: Plan) -> dict[str, Json]:
    """diffusers' `lora_adapter_metadata`: each component's LoraConfig, its name before each field."""
    found: dict[str, Json] = {}
    for component in plan.components:
        config = component_config(plan, component)
        config.pop("peft_type", None)
        found |= {f"{component}.{key}": value for key, value in config.items()}
    return found


def component_config(plan: Plan, component: str) -> dict[str, Json]:
    """PEFT's configuration of one component of the output.

    If the input came with one that still says the right scale of every module, it is kept.
    """
    modules = [module for module in plan.modules if module.component == component]
    peft_type = _peft_type(modules, plan)
    scales = [_named(plan, module) for module in modules if module.scale is not None]
    old = plan.adapter.tuners.get("") or plan.adapter.tuners.get(component)
    if old is not None and old.peft_type == peft_type:
        if _still_true(old, scales):
            return dict(old.values)
        base = {key: value for key, value in old.values.items() if key != "use_rslora"}
    else:
        base = {}
    fields = _fields(modules, scales, peft_type)
    return {**base, "peft_type": peft_type, **fields}


def _still_true(config: TunerConfig, scales: list[ModuleScale]) -> bool:
    return all(
        config.scale(m.module, m.rank) == m.scale and m.rank in (0, config.rank(m.module)) for m in scales
    )


def _named(plan: Plan, module: Module) -> ModuleScale:
    """The module's scale under the shortest of the names that its prefix allows.

    A text encoder's names are written with `text_model.` but the model may lack it; PEFT matches
    at the end of names, so the shorter one serves both.
    """
    assert module.scale is not None
    written = plan.target.prefixes[module.component]
    names = [module.scale.module]
    for prefix in plan.adapter.family.spelling[plan.target.layout]:
        if prefix.text == written.text and prefix.component == module.component:
            row = plan.adapter.family.names(module.component, prefix.naming).at(module.cut.row.span, "weight")
            names += [row.native] if row is not None else []
    shortest = min(names, key=len)
    return ModuleScale(shortest, module.scale.rank, module.scale.scale)


def _peft_type(modules: list[Module], plan: Plan) -> str:
    types = {_PEFT_TYPES[m.kind] for m in modules if m.kind in _PEFT_TYPES}
    if len(types) > 1:
        raise Unrepresentable(
            f"one PEFT adapter cannot mix {' and '.join(sorted(types))}",
            code="two-kinds",
            hint="--as lora expands them to one kind",
        )
    return types.pop() if types else "LORA"


def _fields(modules: list[Module], scales: list[ModuleScale], peft_type: str) -> dict[str, Json]:
    saved = [m.path for m in modules if m.kind == "set"]
    fields: dict[str, Json] = {"inference_mode": True}
    if saved:
        fields["modules_to_save"] = list[Json](dict.fromkeys(saved))
    match peft_type:
        case "LORA":
            fields |= config_fields(scales)
            fields["use_dora"] = any(_has_magnitude(m) for m in modules)
            fields["lora_bias"] = any(m.kind == "diff" and m.site.param == "bias" for m in modules)
        case "LOHA" | "LOKR":
            general = config_fields(scales) if scales else {}
            general["alpha"] = general.pop("lora_alpha", general.get("r"))
            fields |= general
        case "IA3":
            on_input = [m.path for m in modules if _on_input(m)]
            fields["target_modules"] = list[Json](m.path for m in modules if m.kind == "ia3")
            fields["feedforward_modules"] = list[Json](on_input)
        case _:
            fields["target_modules"] = list[Json](m.path for m in modules if m.kind in _PEFT_TYPES)
    return fields


def _has_magnitude(module: Module) -> bool:
    return any(part.source and isinstance(part.source.change, Magnitude) for part in module.cut.parts)


def _on_input(module: Module) -> bool:
    return any(part.source and getattr(part.source.change, "on_input", False) for part in module.cut.parts)
