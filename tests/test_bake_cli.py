"""`adapterkit bake`, as it is called and as it answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bake_cases import adapter, base_tensors, loaded, lora, model_folder
from cli_support import run

HASH = 64


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model_folder(tmp_path / "base", base_tensors(), shards=2)
    adapter(tmp_path / "one", lora(1))
    adapter(tmp_path / "two", lora(2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_says_what_would_be_done_and_writes_nothing(case: Path) -> None:
    result = run("bake", "base", "one=0.5", "two", "--plan")
    assert result.exit_code == 0
    assert "one × 0.5: LoRA" in result.stdout
    assert "8 = 8 applied" in result.stdout
    assert "12 = 4 changed + 8 untouched" in result.stdout
    assert sorted(entry.name for entry in case.iterdir()) == ["base", "one", "two"]


def test_a_receipt_holds_hashes_and_what_is_kept(case: Path) -> None:
    result = run("bake", "base", "one", "-o", "out", "-v")
    assert result.exit_code == 0
    assert "of the changes after rounding" in result.stdout
    assert result.stdout.count("sha256") == 2
    assert "model.layers.0.attn.q_proj.weight" in result.stdout


def test_json_has_the_same_facts(case: Path) -> None:
    document = json.loads(run("bake", "base", "one", "two=0", "-o", "out", "--json").stdout)
    assert document["command"] == "bake"
    assert document["outcomes"] == {"applied": 4, "at strength 0": 4}
    assert document["tensors"] == {"total": 12, "changed": 4, "new": []}
    assert [len(file["sha256"]) for file in document["files"]] == [HASH, HASH]
    assert 0.99 < document["kept"]["ratio"] < 1.01
    assert len(document["kept"]["tensors"]) == 4


def test_quiet_says_where_the_result_is(case: Path) -> None:
    assert run("-q", "bake", "base", "one", "-o", "out").stdout == "out\n"


def test_what_was_baked_is_undone_by_its_bits_or_by_subtracting(case: Path) -> None:
    assert run("bake", "base", "one=0.5", "-o", "out", "--keep-undo").exit_code == 0
    restored = run("bake", "--undo", "out", "-o", "again")
    assert "byte for byte" in restored.stdout
    assert (case / "again" / "config.json").read_bytes() == (case / "base" / "config.json").read_bytes()
    for name, tensor in loaded(case / "base").items():
        assert tensor.equal(loaded(case / "again")[name])
    named = run("bake", "--undo", "out", "out.undo", "-o", "named", "--json")
    assert json.loads(named.stdout)["command"] == "undo"
    near = run("bake", "--undo", "out", "one=0.5", "-o", "near")
    assert "of the changes: they were rounded twice" in near.stdout


def test_a_strength_is_given_behind_the_name(case: Path) -> None:
    run("bake", "base", "one=-1e0", "-o", "minus")
    run("bake", "base", "one", "-o", "plus")
    base, plus, minus = (loaded(case / name) for name in ("base", "plus", "minus"))
    name = "model.layers.0.attn.q_proj.weight"
    assert (plus[name] + minus[name]).allclose(2 * base[name], atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["base", "one"], "usage"),
        (["base", "-o", "out"], "usage"),
        (["base", "one", "-o", "base"], "exists"),
        (["base", "one", "-o", "out", "--blocks", "5:layers.0=1"], "strengths"),
        (["nowhere", "one", "-o", "out"], "no-file"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], code: str, case: Path) -> None:
    result = run("bake", *arguments, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["code"] == code
    assert not (case / "out").exists()


def test_no_hash_is_told_where_none_is_wanted(case: Path) -> None:
    result = run("bake", "base", "one", "-o", "out", "--no-hash")
    assert "sha256" not in result.stdout
    document = json.loads(run("bake", "base", "one", "-o", "other", "--no-hash", "--json").stdout)
    assert {file["sha256"] for file in document["files"]} == {None}
