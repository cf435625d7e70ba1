"""Adapters changed at random: whatever was done to them, a proven result or an error that helps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from front_door import (
    CONFIG,
    Tensors,
    config_of,
    contents,
    diffusers,
    dora,
    fused,
    kohya,
    llama,
    loha,
    lokr,
    peft_folder,
    write,
)

from adapterkit import ConvertOptions, convert, diff, inspect
from adapterkit.cli.output import Fault as OurFault
from adapterkit.cli.output import as_error
from adapterkit.specs.tuner_config import METADATA_KEY

T = TypeVar("T")
Mutation = Callable[[random.Random, Tensors, dict[str, str]], None]


def any_key(rng: random.Random, tensors: Tensors) -> str:
    return rng.choice(sorted(tensors))


def drop(rng: random.Random, tensors: Tensors, metadata: dict[str, str]) -> None:
    del tensors[any_key(rng, tensors)]


def changed(rng: random.Random, key: str) -> str:
    """The key with one part dropped, doubled, cut, or put in place of another."""
    sign = rng.choice("._")
    parts = key.split(sign)
    place = rng.randrange(len(parts))
    word = rng.choice(
        ["", parts[place] * 2, parts[place][:-1], rng.choice(parts), "up", "down", "7", "weight", "é"]
    )
    return sign.join([*parts[:place], *([word] if word else []), *parts[place + 1 :]]) or "x"


def rename(rng: random.Random, tensors: Tensors, metadata: dict[str, str]) -> None:
    key = any_key(rng, tensors)
    tensors[changed(rng, key)] = tensors.pop(key)


def double(rng: random.Random, tensors: Tensors, metadata: dict[str, str]) -> None:
    key = any_key(rng, tensors)
    tensors[changed(rng, key)] = tensors[key].clone()


def swap(rng: random.Random, tensors: Tensors, metadata: dict[str, str]) -> None:
    one, other = any_key(rng, tensors), any_key(rng, tensors)
    tensors[one], tensors[other] = tensors[other], tensors[one]


def reshape(rng: random.Random, tensors: Tensors, metadata: dict[str, str]) -> None:
    """An axis more or fewer, axes turned round, or rows and columns cut away."""
    key = any_key(rng, tensors)
    old = tensors[key]
    ways = [old[..., None], old[None], old.flatten(), old.flatten()[:1], old.flatten()[:0]]
    if old.ndim:
        ways += [old.movedim(0, -1), old[:-1], old[..., :-1], old[:0], torch.cat([old, old])]
    tensors[key] = rng.choice(ways).contiguous().clone()


def retype(rng: random.Random, tensors: Tensors, metadata: dict[str, str]) -> None:
    key = any_key(rng, tensors)
    types = ["float64", "float16", "bfloat16", "float8_e4m3fn", "int64", "int8", "uint8", "bool", "complex64"]
    dtype = getattr(torch, rng.choice(types))
    old = tensors[key].real if tensors[key].is_complex() else tensors[key]
    tensors[key] = old.to(dtype)


def spoil(rng: random.Random, tensors: Tensors, metadata: dict[str, str]) -> None:
    flat = tensors[any_key(rng, tensors)].view(-1)
    if len(flat) and flat.is_floating_point():
        flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), 1e38, -1e38, 0.0])


WRONG_VALUES = [None, -1, 0, 10**400, "4", [4], {"q": 4}, {"(": 1}, 4.5, True]


def garble(rng: random.Random, tensors: Tensors, metadata: dict[str, str]) -> None:
    """The configuration cut short, or with a field of another type."""
    text = metadata.get(METADATA_KEY, json.dumps(CONFIG))
    field = rng.choice(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type"])
    value = json.dumps(rng.choice(WRONG_VALUES))
    wrong = text.replace("{", f'{{"unet.{field}": {value}, "{field}": {value}, ', 1)
    metadata[METADATA_KEY] = rng.choice([text[: rng.randrange(len(text) + 1)], wrong, wrong, "\0", "[]"])


MUTATIONS: list[Mutation] = [drop, rename, double, swap, reshape, retype, spoil, garble]
STARTS: dict[str, Callable[[], tuple[Tensors, dict[str, str]]]] = {
    "kohya": lambda: (kohya(), {"ss_network_dim": "4"}),
    "diffusers": lambda: (
        diffusers(),
        config_of(rank_pattern={}, alpha_pattern={"to_q": 4}, use_rslora=False),
    ),
    "fused": lambda: (fused(), {}),
    "loha": lambda: (loha(), {}),
    "lokr": lambda: (lokr(), {}),
    "dora": lambda: (dora(), {}),
    "pickle": lambda: (kohya(), {}),
    "peft": lambda: (llama(), {METADATA_KEY: json.dumps(CONFIG)}),
}
TARGETS = ["kohya", "diffusers", "comfyui", "peft", "onetrainer", "diffusers-2023"]


def start(name: str, seed: int, folder: Path) -> Path:
    """An adapter with one to three mutations; a PEFT folder's metadata is its configuration."""
    rng = random.Random(seed)
    tensors, metadata = STARTS[name]()
    for _ in range(rng.choice([1, 1, 2, 3])):
        rng.choice(MUTATIONS)(rng, tensors, metadata)
        if not tensors:
            break
    if name == "peft":
        return peft_folder(folder / "style", metadata[METADATA_KEY].encode(), tensors)
    if name == "pickle":
        torch.save(tensors, folder / "style.pt")
        return folder / "style.pt"
    return write(folder / "style.safetensors", tensors, metadata)


def check_survives(name: str, seed: int, tmp_path: Path) -> None:
    """Whatever was done to it: a proven result with an even receipt, or an error with a hint, no files."""
    (tmp_path / "in").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    source = start(name, seed, tmp_path / "in")
    before = contents(tmp_path)
    rng = random.Random(seed)
    to = rng.choice(TARGETS)
    options = ConvertOptions(
        fold=rng.random() < 0.2,
        as_lora=rng.random() < 0.2,
        dtype=rng.choice([None, None, "bf16", "fp16"]),
        allow=frozenset(
            rng.sample(["unclaimed", "incomplete", "untranslatable", "nonfinite"], rng.choice([0, 0, 2, 4]))
        ),
        verify="full",
    )
    check_error_or(lambda: inspect(source))
    done = check_error_or(lambda: convert(source, to, tmp_path / "out" / "new", options))
    if done is None:
        assert contents(tmp_path) == before
        return
    assert done.receipt.balances
    assert done.verification is not None
    written = {str(path.relative_to(tmp_path)) for path in done.files}
    assert {path for path, data in contents(tmp_path).items() if data} == {
        p for p, d in before.items() if d
    } | written
    if not (options.allow or options.dtype or done.plan.rounded):
        assert diff(
            source, tmp_path / "out" / "new", family=done.plan.adapter.family.key, tolerance=1e-5
        ).equal


def check_error_or(work: Callable[[], T]) -> T | None:
    """What the work gives, or None if it ended in an error that says what to do."""
    try:
        return work()
    except Exception as error:
        shown = as_error(error)
        assert not isinstance(shown, OurFault), repr(error)
        assert shown.exit_code in (1, 2), repr(error)
        assert shown.hint, repr(error)
        return None


@pytest.mark.parametrize("name", STARTS)
def test_a_changed_adapter_is_converted_and_proven_or_refused(name: str, tmp_path: Path) -> None:
    for seed in range(30):
        check_survives(name, seed, tmp_path / str(seed))


@pytest.mark.fuzz
@pytest.mark.parametrize("name", STARTS)
def test_many_changed_adapters_are_converted_and_proven_or_refused(name: str, tmp_path: Path) -> None:
    for seed in range(1_000, 6_000):
        check_survives(name, seed, tmp_path / str(seed))
