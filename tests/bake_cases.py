"""A small language model in files, and adapters for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = [f"model.layers.{index}.{name}" for index in (0, 1) for name in ("attn.q_proj", "mlp.up_proj")]
CONFIG = {"architectures": ["TinyForCausalLM"], "vocab_size": 12, "tie_word_embeddings": False}


def numbers(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def base_tensors(dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    tensors = {"model.embed_tokens.weight": numbers(12, 8, seed=1, dtype=dtype)}
    for index, name in enumerate(LAYERS):
        tensors[f"{name}.weight"] = numbers(16, 8, seed=10 + index, dtype=dtype)
        tensors[f"{name}.bias"] = numbers(16, seed=30 + index, dtype=dtype)
    tensors["model.norm.weight"] = numbers(8, seed=50, dtype=dtype)
    tensors["lm_head.weight"] = numbers(12, 8, seed=51, dtype=dtype)
    tensors["places"] = torch.arange(12)
    return tensors


def lora(seed: int, names: list[str] = LAYERS, rank: int = 2, width: int = 8) -> dict[str, Tensor]:
    tensors = {}
    for index, name in enumerate(names):
        front = f"base_model.model.{name}"
        tensors[f"{front}.lora_A.weight"] = numbers(rank, width, seed=seed + index)
        tensors[f"{front}.lora_B.weight"] = numbers(16, rank, seed=seed + 100 + index, scale=0.3)
    return tensors


def adapter(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "tiny", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def model_folder(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, **config: object) -> Path:
    """A transformers folder with its tensors in one file, or in shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}, indent=1))
    (folder / "tokenizer.json").write_text("{}")
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    home = {name: files[index * shards // len(names)] for index, name in enumerate(names)}
    for file in files:
        mine = {name: tensors[name] for name in names if home[name] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
