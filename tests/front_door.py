"""What a fault must look like from outside: the law, and the small adapters that faults are made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.cli.app import app
from adapterkit.errors import Json
from adapterkit.specs.tuner_config import METADATA_KEY

Tensors = dict[str, Tensor]

# Cross attention of SDXL, whose text is 2048 wide, so that no other model has these shapes.
BLOCK = "input_blocks_4_1_transformer_blocks_0_attn2_to_"
Q, K, V = (f"lora_unet_{BLOCK}{side}" for side in "qkv")
DOTTED = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
INPUTS = {"q": 640, "k": 2048, "v": 2048}
RANK = 4
# So wide that no line is folded and messages can be looked for as they are.
WIDE = {"COLUMNS": "20000"}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def kohya(alpha: float | Tensor = 2.0, dtype: torch.dtype = torch.float32, modules: str = "qkv") -> Tensors:
    """A LoRA of SDXL as kohya writes it."""
    tensors: Tensors = {}
    for seed, side in enumerate(modules):
        name = f"lora_unet_{BLOCK}{side}"
        tensors[f"{name}.lora_down.weight"] = numbers(RANK, INPUTS[side], seed=seed, dtype=dtype)
        tensors[f"{name}.lora_up.weight"] = numbers(640, RANK, seed=seed + 9, dtype=dtype)
        tensors[f"{name}.alpha"] = torch.as_tensor(alpha).clone()
    return tensors


def diffusers(modules: str = "qkv", rank: int = RANK) -> Tensors:
    """A LoRA of SDXL as diffusers writes it."""
    tensors: Tensors = {}
    for seed, side in enumerate(modules):
        tensors[f"{DOTTED}{side}.lora_A.weight"] = numbers(rank, INPUTS[side], seed=seed)
        tensors[f"{DOTTED}{side}.lora_B.weight"] = numbers(640, rank, seed=seed + 9)
    return tensors


def llama(adapter: str = "", layers: int = 2) -> Tensors:
    """A LoRA of a language model as PEFT writes it; `adapter` is a name left in its keys."""
    slot = f".{adapter}" if adapter else ""
    tensors: Tensors = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A{slot}.weight"] = numbers(RANK, 64, seed=layer)
        tensors[f"{name}.lora_B{slot}.weight"] = numbers(64, RANK, seed=layer + 9)
    return tensors


def fused() -> Tensors:
    """FLUX.1's q, k and v of one block in one module."""
    return {
        f"{QKV}.lora_down.weight": numbers(RANK, 3072),
        f"{QKV}.lora_up.weight": numbers(9216, RANK, seed=1),
        f"{QKV}.alpha": torch.tensor(4.0),
    }


def loha() -> Tensors:
    shapes = {"w1_a": (640, RANK), "w1_b": (RANK, 640), "w2_a": (640, RANK), "w2_b": (RANK, 640)}
    return {f"{Q}.hada_{role}": numbers(*shape, seed=n) for n, (role, shape) in enumerate(shapes.items())}


def lokr() -> Tensors:
    shapes = {"w1": (4, 4), "w2_a": (160, RANK), "w2_b": (RANK, 160)}
    tensors = {f"{Q}.lokr_{role}": numbers(*shape, seed=n) for n, (role, shape) in enumerate(shapes.items())}
    return tensors | {f"{Q}.alpha": torch.tensor(2.0)}


def dora() -> Tensors:
    return kohya() | {f"{Q}.dora_scale": torch.ones(640, 1)}


def names(*keys: str) -> Tensors:
    return {key: torch.ones(4, 4) for key in keys}


CONFIG: dict[str, Json] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "someone/something",
}


def config_of(**fields: Json) -> dict[str, str]:
    """diffusers' metadata for the UNet."""
    values: dict[str, Json] = {"r": RANK, "lora_alpha": 8, **fields}
    return {METADATA_KEY: json.dumps({f"unet.{name}": value for name, value in values.items()})}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, path, dict(metadata or {}) or None
    )
    return path


def peft_folder(folder: Path, config: object = CONFIG, tensors: Tensors | None = None) -> Path:
    """A PEFT folder; a config of bytes is written as it stands, None is left out."""
    write(folder / "adapter_model.safetensors", tensors or llama())
    if config is not None:
        raw = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "adapter_config.json").write_bytes(raw)
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner(env=WIDE).invoke(app, [str(argument) for argument in arguments])


def document(result: Result) -> dict[str, Json]:
    return cast(dict[str, Json], json.loads(result.stdout))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes, and the folders themselves."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Fault:
    """One way in which an input is wrong, and what the command line says of it.

    make: puts the input into a folder and returns what is given to the commands.
    code: of the error.  says: parts of its message.  hint: a part of the hint.  exit_code: of `convert`.
    seen: what `inspect` makes of it: "error", the same one; "fine", nothing; else the code of a problem.
    options: of `convert`.
    """

    name: str
    make: Callable[[Path], Path]
    code: str
    says: tuple[str, ...] = ()
    hint: str = ""
    exit_code: int = 2
    seen: str = "error"
    to: str = "diffusers"
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def saved(
    tensors: Tensors | Callable[[], Tensors], metadata: Mapping[str, str] | None = None
) -> Callable[[Path], Path]:
    """Writes these tensors to a file."""
    return lambda folder: write(
        folder / "style.safetensors", tensors if isinstance(tensors, dict) else tensors(), metadata
    )


def raw(data: bytes, name: str = "style.safetensors") -> Callable[[Path], Path]:
    """Writes these bytes to a file."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    return make


def check_fault(fault: Fault, tmp_path: Path) -> None:
    """The error names the file, the cause and what to do, and leaves everything as it was."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    source = fault.make(tmp_path / "in")
    before = contents(tmp_path)
    commands = [
        ("convert", source, "--to", fault.to, "-o", tmp_path / "out" / "new", *fault.options),
        *([("inspect", source), ("diff", source, source)] if fault.seen == "error" else ()),
    ]
    for command in commands:
        exit_code = fault.exit_code if command[0] == "convert" else 2
        check_error(fault, source, run(*command), exit_code)
        check_error_document(fault, run(*command, "--json"), exit_code)
    if fault.seen != "error":
        result = run("inspect", source, "--json")
        assert result.exit_code == 0, result.output
        (found,) = cast(list[dict[str, list[dict[str, str]]]], document(result)["files"])
        codes = [problem["code"] for problem in found["problems"]]
        assert fault.seen in (codes or ["fine"]), codes
    assert contents(tmp_path) == before


def check_error(fault: Fault, source: Path, result: Result, exit_code: int) -> None:
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    first, hint, *_ = result.stderr.splitlines()
    assert first.startswith(f"error[{fault.code}]: {source}"), first
    for part in fault.says:
        assert part in first, first
    assert hint.startswith("hint: ")
    assert fault.hint in hint, hint
    assert "Traceback" not in result.stderr


def check_error_document(fault: Fault, result: Result, exit_code: int) -> None:
    """With --json the same as one document on stdout, and nothing on stderr."""
    assert (result.exit_code, result.stderr) == (exit_code, "")
    found = document(result)
    assert found["schema"] == 1
    assert found["code"] == fault.code
    assert all(part in str(found["message"]) for part in fault.says), found["message"]
    assert fault.hint in str(found["hint"])
    assert isinstance(found["details"], dict)
