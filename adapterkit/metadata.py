"""What stands in the output's metadata.

Metadata is carried. What a conversion makes untrue is made true again or left out: hashes of the
tensors, ranks and alphas, and the places where the scale stands.
"""

from __future__ import annotations

import json

from adapterkit.adapter import Adapter
from adapterkit.errors import Json
from adapterkit.peft_config import component_config
from adapterkit.plan import Plan
from adapterkit.scale import network_arguments
from adapterkit.specs.tuner_config import METADATA_KEY
from adapterkit.stores import DATA_SHA256

# kohya's hash of a header that other metadata is not part of; it cannot be made again.
_NOT_RECOMPUTABLE = ("sshs_legacy_hash",)
_TENSOR_HASHES = ("sshs_model_hash", "modelspec.hash_sha256")


def output_metadata(plan: Plan) -> dict[str, str]:
    """The metadata of the written file; hashes of its tensors are filled in by the writer."""
    metadata = {key: value for key, value in plan.adapter.metadata.items() if key not in _NOT_RECOMPUTABLE}
    metadata.pop(METADATA_KEY, None)
    metadata["format"] = "pt"
    renew_hashes(metadata)
    _renew_ranks(metadata, plan)
    if any(module.kind == "glora" for module in plan.modules):
        _renew_arguments(metadata)
    if plan.target.scale == "lora_adapter_metadata":
        metadata[METADATA_KEY] = json.dumps(_diffusers_config(plan), indent=2, sort_keys=True)
    return metadata


def drop_hashes(metadata: dict[str, str]) -> None:
    """Leave out hashes of the tensors, which are others now."""
    for key in _TENSOR_HASHES:
        metadata.pop(key, None)


def renew_hashes(metadata: dict[str, str]) -> None:
    """Let hashes of the tensors be filled in by the writer, where the file has any."""
    for key in _TENSOR_HASHES:
        if key in metadata:
            # kohya writes the bare digits, ModelSpec and LyCORIS put 0x before them.
            metadata[key] = ("0x" if metadata[key].startswith("0x") else "") + DATA_SHA256


def _renew_ranks(metadata: dict[str, str], plan: Plan) -> None:
    """kohya's summary of ranks and alphas, where the file has one and they are others than they were."""
    scales = [module.scale for module in plan.modules if module.scale is not None and module.scale.rank]
    ranks, alphas = {s.rank for s in scales}, {_rounded(s.rank * s.scale) for s in scales}
    for key, values, before in (
        ("ss_network_dim", ranks, _ranks_read(plan.adapter)),
        ("ss_network_alpha", alphas, _alphas_read(plan.adapter)),
    ):
        if key in metadata and values and (plan.adapter.computed or values != before):
            metadata[key] = f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"


def _ranks_read(adapter: Adapter) -> set[int]:
    return {change.rank for changes in adapter.changes.values() for change in changes if change.rank}


def _alphas_read(adapter: Adapter) -> set[float]:
    return {_rounded(scale.alpha) for scale in adapter.scales.values() if scale.alpha is not None}


def _rounded(alpha: float) -> float:
    return float(f"{alpha:.6g}")


def _renew_arguments(metadata: dict[str, str]) -> None:
    """LyCORIS's GLoRA alone stores alpha as it was given to rsLoRA; what we write is alpha over rank."""
    arguments = network_arguments(metadata)
    if arguments.get("rs_lora"):
        metadata["ss_network_args"] = json.dumps({**arguments, "rs_lora": False})


def _diffusers_config(plan: Plan) -> dict[str, Json]:
    """diffusers' `lora_adapter_metadata`: each component's LoraConfig, its name before each field."""
    found: dict[str, Json] = {}
    for component in plan.components:
        config = component_config(plan, component)
        config.pop("peft_type", None)
        found |= {f"{component}.{key}": value for key, value in config.items()}
    return found
