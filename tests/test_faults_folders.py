"""PEFT folders and indexes of shards that are wrong, through the front door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from front_door import CONFIG, Fault, check_fault, kohya, peft_folder, raw, run, write


def folder_of(config: object) -> Callable[[Path], Path]:
    return lambda folder: peft_folder(folder / "adapter", config)


def with_field(field: str, value: object) -> Callable[[Path], Path]:
    return folder_of({**CONFIG, field: value})


def bad_field(field: str, value: object, says: str) -> Fault:
    return Fault(
        f"{field} {value}",
        with_field(field, value),
        "bad-config",
        (f"`{field}`", says),
        "correct it",
        seen="bad-config",
        to="peft",
    )


CONFIGS = [
    Fault(
        "a config that breaks off", folder_of(b'{"r": 4'), "json", ("adapter_config.json", "not valid JSON")
    ),
    Fault("a config that is a list", folder_of(b"[1]"), "json", ("not a JSON object",)),
    Fault("a config that is a web page", folder_of(b"<!doctype html>"), "web-page", ("adapter_config.json",)),
    Fault("an empty config", folder_of(b""), "empty-file", ("adapter_config.json",), "download"),
    Fault(
        "a config that says r twice", folder_of(b'{"r": 4, "r": 8}'), "duplicate-key", ("`r` stands twice",)
    ),
    Fault("NaN in a config", folder_of(b'{"r": 4, "lora_alpha": NaN}'), "json", ("NaN is not JSON",)),
    bad_field("r", "four", "is `'four'`, not a whole number"),
    bad_field("r", -1, "not a whole number"),
    bad_field("r", True, "not a whole number"),
    bad_field("lora_alpha", "8", "is `'8'`, not a finite number"),
    bad_field("lora_alpha", [8], "not a finite number"),
    bad_field("lora_alpha", 10**400, "not a finite number"),
    bad_field("rank_pattern", ["q_proj"], "not an object of whole numbers"),
    bad_field("alpha_pattern", {"q_proj": "x"}, "not an object of finite numbers"),
    bad_field("alpha_pattern", {"(": 4}, "no regular expression: `'('`"),
    bad_field("alpha_pattern", {"(([a-z_.]+)+)+X": 4}, "could take for ever to match"),
    bad_field("alpha_pattern", {"(q|q)*X": 4}, "could take for ever to match"),
    bad_field("use_rslora", "false", "is `'false'`, not true or false"),
    bad_field("target_parameters", 7, "not a list of names"),
    bad_field("trainable_token_indices", "1", "not a list of row numbers"),
    Fault(
        "another rank than the factors have",
        with_field("r", 8),
        "rank-conflict",
        ("factors have rank 4, adapter_config.json says 8", "q_proj"),
        "correct the rank",
        exit_code=1,
        seen="rank-conflict",
        to="peft",
    ),
    Fault("a folder with nothing in it", lambda folder: folder, "no-file", ("no tensor file",), "download"),
    Fault(
        "a config without its tensors",
        lambda folder: raw(b"{}", "adapter_config.json")(folder).parent,
        "no-file",
        ("holds adapter_config.json, but no adapter_model.safetensors",),
        "download the rest",
    ),
    Fault(
        "a config given instead of the folder",
        raw(b'{"r": 4}', "adapter_config.json"),
        "json-file",
        (),
        "folder",
    ),
]


@pytest.mark.parametrize("fault", CONFIGS, ids=str)
def test_peft_folders_that_are_wrong(fault: Fault, tmp_path: Path) -> None:
    check_fault(fault, tmp_path)


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (None, "no adapter_config.json: the adapter's scale and kind can only be guessed"),
        ({**CONFIG, "base_model_name_or_path": None}, "adapter_config.json names no base model"),
    ],
    ids=["missing", "without a base model"],
)
def test_what_a_config_leaves_open_is_said(config: object, note: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "adapter", config)
    assert note in run("inspect", folder).stdout
    assert f"note: {note}" in run("convert", folder, "--to", "peft", "-o", tmp_path / "new").stdout


def test_fields_nobody_knows_are_kept(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "adapter", {**CONFIG, "of_the_future": {"a": [1, None]}})
    assert run("convert", folder, "--to", "peft", "-o", tmp_path / "new").exit_code == 0
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["of_the_future"] == {
        "a": [1, None]
    }


def sharded(weight_map: object, *, also: bool = False) -> Callable[[Path], Path]:
    """An index and its one shard `one.safetensors`; `also`: the same tensors in a second shard."""

    def make(folder: Path) -> Path:
        write(folder / "one.safetensors", kohya())
        if also:
            write(folder / "two.safetensors", kohya())
        index = folder / "style.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        return index

    return make


MAP = dict.fromkeys(kohya(), "one.safetensors")
INDEXES = [
    Fault(
        "a missing shard",
        sharded({**MAP, "x": "two.safetensors"}),
        "missing-shards",
        ("1 of 2 shards are missing: `two.safetensors`",),
        "ownload",
    ),
    Fault(
        "a way out of the folder",
        sharded({**MAP, "x": "../two.safetensors"}),
        "unsafe",
        ("lies outside the folder",),
    ),
    Fault("an absolute shard", sharded({**MAP, "x": "/etc/passwd"}), "unsafe", ("lies outside the folder",)),
    Fault(
        "a tensor that is nowhere", sharded({**MAP, "x": "one.safetensors"}), "index", ("`x` should be in",)
    ),
    Fault(
        "a tensor in two shards",
        sharded({**MAP, next(iter(MAP)): "two.safetensors"}, also=True),
        "duplicate-key",
        ("in two shards",),
    ),
    Fault("an index of itself", sharded({"x": "style.safetensors.index.json"}), "json-file"),
    Fault("no map", sharded([1]), "index", ("no `weight_map`",)),
]


@pytest.mark.parametrize("fault", INDEXES, ids=str)
def test_indexes_of_shards_that_are_wrong(fault: Fault, tmp_path: Path) -> None:
    check_fault(fault, tmp_path)
