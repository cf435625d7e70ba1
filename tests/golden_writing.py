"""Golden files in the making: how layouts spell, what is noted of each delta, and how it is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from golden_kinds import Array, Made, Stored, probe

FOLDER = Path(__file__).parent.parent / "fixtures" / "golden"

# How layouts spell the tensors of a change, behind the module's name.
KOHYA = {
    "up": ".lora_up.weight", "down": ".lora_down.weight", "mid": ".lora_mid.weight",
    **{role: f".hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "a1": ".a1.weight", "a2": ".a2.weight", "b1": ".b1.weight", "b2": ".b2.weight",
    "blocks": ".oft_blocks", "rescale": ".rescale", "vector": ".weight", "on_input": ".on_input",
    "shape": ".reshape_weight", "p": ".p_layer.weight", "q": ".q_layer.weight", "lambda": ".lambda_layer",
    "magnitude": ".dora_scale", "alpha": ".alpha", "bias": ".lora_up.bias", "value": ".diff",
}  # fmt: skip
LOKR = {role: f".lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")} | {
    "alpha": ".alpha"
}
DIFFUSERS = {
    "up": ".lora_B.weight", "down": ".lora_A.weight", "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
}  # fmt: skip
PEFT = DIFFUSERS | {
    **{role: f".hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "vector": ".ia3_l", "blocks": ".oft_R.weight", "b": ".vera_lambda_b", "d": ".vera_lambda_d",
}  # fmt: skip
SCALE = 0.5


@dataclass
class Golden:
    """One golden file in the making. deltas: shape and norm, by the full canonical name of the tensor."""

    what: str
    family: str
    layouts: list[str]
    kinds: list[str]
    dtype: str = "float16"
    suffix: str = ".safetensors"
    metadata: dict[str, str] = field(default_factory=dict)
    config: Mapping[str, object] | None = None
    tensors: dict[str, Stored] = field(default_factory=dict)
    deltas: dict[str, dict[str, object]] = field(default_factory=dict)

    def add(self, native: str, made: Made, spelled: Mapping[str, str], *rows: str | tuple[str, int]) -> None:
        """One module. rows: the canonical modules whose rows it stacks, with their shares of the height."""
        for role, tensor in made.tensors.items():
            self.tensors[native + spelled[role]] = tensor.astype(self.dtype)
        for role, exact in made.exact.items():
            self.tensors[native + spelled[role]] = exact
        if made.rank is not None and "alpha" in spelled:
            self.tensors[native + spelled["alpha"]] = np.array(SCALE * made.rank, dtype=np.float32)
        shares = [row if isinstance(row, tuple) else (row, 1) for row in rows]
        edges = np.cumsum([share for _, share in shares])
        parts = np.split(made.delta, edges[:-1] * len(made.delta) // edges[-1])
        for (name, _), part in zip(shares, parts, strict=True):
            self.note(f"{name}.weight", part, known=made.known)
        if made.bias is not None:
            self.note(f"{shares[0][0]}.bias", made.bias)

    def note(self, name: str, delta: Array, *, known: bool = True) -> None:
        norm, turn = (float(np.linalg.norm(delta)), float((delta * probe(*delta.shape)).sum()))
        found = {"norm": norm, "probe": turn} if known else {"norm": None, "probe": None}
        self.deltas[name] = {"shape": list(delta.shape), **found}

    def facts(self) -> str:
        """What is noted beside the file, a line for each delta."""
        head = {"what": self.what, "family": self.family, "layouts": self.layouts, "kinds": self.kinds}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        deltas = [f"    {json.dumps(name)}: {json.dumps(delta)}" for name, delta in self.deltas.items()]
        lines.append('  "deltas": {\n' + ",\n".join(deltas) + "\n  }")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def write(self, name: str) -> None:
        if (FOLDER / f"{name}.json").exists():
            raise SystemExit(f"{name} is there already, and golden files are written once")
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{name}.json").write_text(self.facts(), encoding="utf-8")
        path = FOLDER / f"{name}{self.suffix}"
        if self.config is not None:
            (FOLDER / name).mkdir()
            (FOLDER / name / "adapter_config.json").write_text(
                json.dumps(self.config, indent=1) + "\n", encoding="utf-8"
            )
            path = FOLDER / name / "adapter_model.safetensors"
        _save(path, self.tensors, self.metadata)


def _save(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    if path.suffix == ".pt":
        import torch

        torch.save({key: torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items()}, path)
        return
    from safetensors.numpy import save_file

    save_file(
        {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()},
        path,
        {"format": "pt", **metadata},
    )
