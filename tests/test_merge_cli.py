"""The command line of merge: arguments, reports, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_support import document, dora, flux, run
from safetensors.torch import load_file

from adapterkit.cli.merge import strengthened
from adapterkit.errors import UsageError


@pytest.mark.parametrize(
    ("argument", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors=0.8", "a.safetensors", 0.8),
        ("a.safetensors=-.3", "a.safetensors", -0.3),
        ("a.safetensors=+1e-1", "a.safetensors", 0.1),
        ("a=b.safetensors=2", "a=b.safetensors", 2.0),
        ("a=b.safetensors", "a=b.safetensors", 1.0),
        ("lr=0.0001", "lr", 0.0001),
        ("run=1/a.safetensors", "run=1/a.safetensors", 1.0),
        ("a=", "a=", 1.0),
        ("a=nan", "a=nan", 1.0),
    ],
)
def test_the_last_equals_sign_before_a_number_parts_an_adapter_from_its_strength(
    argument, path, strength
) -> None:
    assert strengthened(argument) == (path, strength)


def test_what_exists_under_the_whole_name_is_a_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.0001").touch()
    assert strengthened("lr=0.0001") == ("lr=0.0001", 1.0)
    assert strengthened("lr=0.0001=0.5") == ("lr=0.0001", 0.5)


@pytest.mark.parametrize("strength", ["", "half", "nan", "0,5"])
def test_what_stands_for_a_strength_and_is_none_is_said_to_be_none(strength: str, tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").touch()
    with pytest.raises(UsageError, match=f"`{strength}` in .* is not a strength"):
        strengthened(f"{tmp_path / 'style.safetensors'}={strength}")


def test_two_adapters_become_one_file(tmp_path) -> None:
    a, b = flux(tmp_path / "a.safetensors"), flux(tmp_path / "b=2.safetensors", seed=50)
    out = tmp_path / "out.safetensors"
    result = run("merge", f"{a}=0.8", f"{b}=-0.3", "-o", out, columns=120)
    assert result.exit_code == 0, result.output
    assert "b=2.safetensors" in result.output and "-0.3" in result.output and "cosine" in result.output
    assert "24 in = 24 mapped + 0 carried + 0 dropped" in result.output
    ours, first, second = load_file(out), load_file(a), load_file(b)
    for key in (key for key in first if "lora_up" in key):
        stem = key.removesuffix(".lora_up.weight")
        wanted = sum(
            strength * float(state[f"{stem}.alpha"]) / 2 * state[key] @ state[f"{stem}.lora_down.weight"]
            for state, strength in ((first, 0.8), (second, -0.3))
        )
        scale = float(ours[f"{stem}.alpha"]) / ours[key].shape[1]
        made = scale * ours[key] @ ours[f"{stem}.lora_down.weight"]
        assert torch.allclose(made, wanted, rtol=1e-4, atol=1e-5)


def test_a_plan_shows_all_and_writes_nothing(tmp_path) -> None:
    a, b = flux(tmp_path / "a.safetensors"), flux(tmp_path / "b.safetensors", seed=50)
    result = run("merge", a, b, "--plan", "--method", "svd")
    assert result.exit_code == 0 and "nothing is written" in result.output and "cosine" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_json_holds_the_angles_by_block_the_ranks_and_the_result(tmp_path) -> None:
    a, b = flux(tmp_path / "a.safetensors"), flux(tmp_path / "b.safetensors", seed=50)
    out = tmp_path / "out.safetensors"
    found = document(run("merge", a, f"{b}=0.5", "-o", out, "--rank", "3", "--json"))
    assert found["command"] == "merge" and found["method"] == "linear"
    assert [one["strength"] for one in found["inputs"]] == [1.0, 0.5]
    (pair,) = found["interference"]["pairs"]
    assert set(pair["blocks"]) == {"D00", "D01"} and abs(pair["cosine"]) < 0.1
    assert {module["rank"] for module in found["modules"]} == {3}
    assert found["error"]["measured"] == pytest.approx(found["error"]["ranks"], rel=1e-3)
    assert found["result"]["files"] == [str(out)]
    json.dumps(found, allow_nan=False)


def test_quiet_names_the_file_only(tmp_path) -> None:
    a, out = flux(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    assert run("merge", a, "-o", out, "-q").output.split() == [str(out)]


def test_an_adapter_twice_is_noted(tmp_path) -> None:
    a, out = flux(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    result = run("merge", a, a, "-o", out)
    assert "a.safetensors (1) and a.safetensors (2) are nearly the same" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["merge", "A", "B"], "usage"),
        (["merge", "A", "B", "-o", "OUT", "--rank", "0"], "rank-rule"),
        (["merge", "A", "B", "-o", "OUT", "--rank", "4", "--energy", "0.9"], "rank-rule"),
        (["merge", "A", "B", "-o", "OUT", "--method", "ties", "--density", "2"], "merge-setting"),
        (["merge", "A", "B", "-o", "OUT", "--blocks", "nowhere=1"], "no-match"),
        (["merge", "A", "D", "-o", "OUT"], "merge-kind"),
        (["merge", "A", "missing.safetensors", "-o", "OUT"], "no-file"),
        (["merge", "A", "B", "-o", "A"], "exists"),
    ],
)
def test_what_cannot_be_merged_is_said_and_nothing_is_written(tmp_path, monkeypatch, arguments, code) -> None:
    monkeypatch.chdir(tmp_path)
    for name, make in (("A", flux), ("B", flux), ("D", dora)):
        make(tmp_path / f"{name}.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    named = [f"{text}.safetensors" if text in {"A", "B", "D", "OUT"} else text for text in arguments]
    result = run(*named, "--json")
    assert document(result)["code"] == code and result.exit_code in (1, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
