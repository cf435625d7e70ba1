"""adapterkit resize on the command line."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
import torch
from cli_support import PROJ, QKV, document, dora, flux, run
from manifests import materialise, read_manifest
from safetensors import safe_open
from safetensors.torch import save_file

from adapterkit.cli.ranks import rank_options
from adapterkit.errors import UsageError
from adapterkit.ranks import RankRule


def adapter(path: Path, rank: int = 8) -> Path:
    """A FLUX.1 adapter of two blocks whose spectra fall, one twice as strong as the other."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for block in (0, 1):
        for name, out in ((QKV.format(block), 9216), (PROJ.format(block), 3072)):
            falling = (1 + block) * 2.0 ** -torch.arange(rank)
            tensors[f"{name}.lora_up.weight"] = (torch.randn(out, rank, generator=generator) * falling).half()
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 3072, generator=generator).half()
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path, {"ss_network_dim": "8", "ss_network_alpha": "4"})
    return path


def ranks(path: Path) -> list[int]:
    with safe_open(path, "pt") as found:
        return sorted(found.get_slice(key).get_shape()[0] for key in list(found.keys()) if "lora_down" in key)


def test_a_rank_for_all_is_written_and_told(tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    result = run("resize", adapter(tmp_path / "a.safetensors"), "-o", out, "--rank", "2")
    assert result.exit_code == 0, result.stderr
    assert ranks(out) == [2, 2, 2, 2]
    assert "8 → 2" in result.stdout and "of the squared change" in result.stdout
    assert "D00" in result.stdout and "D01" in result.stdout


def test_a_size_is_kept_to(tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    result = run("resize", adapter(tmp_path / "a.safetensors"), "-o", out, "--size", "200kB")
    assert result.exit_code == 0, result.stderr
    assert 200_000 - 25_000 < out.stat().st_size <= 200_000
    assert len(set(ranks(out))) > 1


def test_a_size_that_is_too_small_says_what_is_possible(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors")
    result = run("resize", source, "-o", tmp_path / "b.safetensors", "--size", "1kB", "--json")
    found = document(result)
    assert result.exit_code == 2 and found["code"] == "size"
    smallest = found["details"]["smallest"]  # type: ignore[index, call-overload]
    again = run("resize", source, "-o", tmp_path / "b.safetensors", "--size", f"{smallest}B")
    assert again.exit_code == 0 and (tmp_path / "b.safetensors").stat().st_size == smallest


def test_several_rules_write_several_files_beside_each_other(tmp_path: Path) -> None:
    source, folder = adapter(tmp_path / "a.safetensors"), tmp_path / "small"
    arguments = ("--rank", "1", "--rank", "3", "--energy", "0.9", "--size", "1MB")
    result = run("resize", source, "-o", folder, *arguments)
    assert result.exit_code == 0, result.stderr
    names = {path.name for path in folder.iterdir()}
    assert names == {f"a.{label}.safetensors" for label in ("rank1", "rank3", "energy0.9", "1MB")}
    assert ranks(folder / "a.rank3.safetensors") == [3, 3, 3, 3]
    assert "a.rank1.safetensors" in result.stdout.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize("place", ["b.safetensors", "b/"])
def test_the_same_rule_twice_or_a_file_for_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    source = adapter(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("mine")
    result = run("resize", source, "-o", f"{tmp_path}/{place}", "--rank", "2", "--rank", "2")
    assert result.exit_code == 2
    assert (tmp_path / "b.safetensors").read_text() == "mine" and not (tmp_path / "b").exists()


def test_the_plan_shows_size_against_error_and_writes_nothing(tmp_path: Path) -> None:
    result = run("resize", adapter(tmp_path / "a.safetensors"), "--plan")
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    lines = result.stdout.splitlines()
    assert any(line.split()[:1] == ["8"] for line in lines)
    assert any(line.lstrip().startswith("1.0 |") for line in lines) and any("+---" in line for line in lines)


def test_the_plan_of_a_rule_is_what_it_then_writes(tmp_path: Path) -> None:
    source, out = adapter(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    found = document(run("resize", source, "--plan", "--energy", "0.95", "--json"))
    (planned,) = found["plans"]  # type: ignore[misc]
    run("resize", source, "-o", out, "--energy", "0.95")
    assert planned["bytes"]["out"] == out.stat().st_size  # type: ignore[index, call-overload]
    assert sorted(one["rank"] for one in planned["modules"]) == ranks(out)  # type: ignore[index, call-overload, union-attr]


def test_the_plot_is_plain_characters(tmp_path: Path) -> None:
    result = run(
        "resize", adapter(tmp_path / "a.safetensors"), "--plan", env={"NO_COLOR": "1"}, charset="ascii"
    )
    assert result.exit_code == 0 and result.stdout.isascii() and "\\u" not in result.stdout


def test_json_has_every_module_with_rank_and_error(tmp_path: Path) -> None:
    source, out = adapter(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    found = document(run("resize", source, "-o", out, "--error", "0.3", "--json"))
    (one,) = found["results"]  # type: ignore[misc]
    assert one["rule"] == {"error": 0.3}  # type: ignore[index, call-overload]
    assert len(one["modules"]) == 4 and one["error"] <= 0.3  # type: ignore[index, call-overload, arg-type, operator]
    assert one["measured"] == pytest.approx(one["error"], abs=1e-3)  # type: ignore[index, call-overload]
    assert {row["block"] for row in one["blocks"]} == {"D00", "D01"}  # type: ignore[index, call-overload, union-attr]


def test_quiet_says_it_in_one_line(tmp_path: Path) -> None:
    source, out = adapter(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    result = run("resize", source, "-o", out, "--rank", "2", "-q")
    assert result.stdout.count("\n") == 1
    assert "rank 8 → 2, " in result.stdout and "kept 9" in result.stdout


def test_another_format_is_written_on_its_own_lines(tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    result = run("resize", adapter(tmp_path / "a.safetensors"), "-o", out, "--rank", "2", "--to", "diffusers")
    assert result.exit_code == 0, result.stderr
    with safe_open(out, "pt") as found:
        downs = [found.get_slice(key).get_shape()[0] for key in list(found.keys()) if "lora_A" in key]
    assert downs == [2] * 8


def test_where_to_is_asked_for(tmp_path: Path) -> None:
    assert run("resize", adapter(tmp_path / "a.safetensors"), "--rank", "2").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rank", "0"),
        ("--rank", "many"),
        ("--energy", "2"),
        ("--error", "1"),
        ("--size", "small"),
        ("--rank", "4", "--min-rank", "5", "--max-rank", "4"),
        ("--device", "abacus", "--rank", "1"),
    ],
)
def test_bad_values_are_bad_usage_with_a_hint(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    source = adapter(tmp_path / "a.safetensors")
    result = run("resize", source, "-o", tmp_path / "b.safetensors", *arguments, "--json")
    found = document(result)
    assert result.exit_code == 2 and found["hint"], found
    assert not (tmp_path / "b.safetensors").exists()


def test_a_dora_without_its_base_is_refused(tmp_path: Path) -> None:
    result = run("resize", dora(tmp_path / "a.safetensors"), "-o", tmp_path / "b.safetensors", "--rank", "1")
    assert result.exit_code == 1 and "--base" in result.stderr


def test_files_are_not_replaced_unasked_and_the_input_only_by_force(tmp_path: Path) -> None:
    source = flux(tmp_path / "a.safetensors")
    before = source.read_bytes()
    assert run("resize", source, "-o", source, "--rank", "1").exit_code == 2
    assert source.read_bytes() == before
    assert run("resize", source, "-o", source, "--rank", "1", "--force").exit_code == 0
    assert ranks(source) == [1, 1, 1, 1]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = adapter(tmp_path / "a.safetensors"), tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = run("resize", source, "-o", folder, "--rank", "1", "--rank", "2")
    assert result.exit_code == 2
    assert not folder.exists() or not list(folder.iterdir())


def test_one_rule_is_enough_for_other_commands() -> None:
    import click

    @click.command()
    @rank_options
    def command(rule: RankRule) -> None:
        seen.append(rule)

    seen: list[RankRule] = []
    command.main(["--energy", "0.9", "--max-rank", "8"], standalone_mode=False)
    assert seen == [RankRule(energy=0.9, most=8)]
    with pytest.raises(UsageError):
        command.main(["--rank", "4", "--size", "1MB"], standalone_mode=False)


def test_what_stays_as_it_was_is_named_and_no_part_of_what_was_kept(tmp_path: Path) -> None:
    tensors = materialise(read_manifest("lycoris_sd15_norm"))
    up = next(key for key in tensors if key.endswith(".lora_up.weight"))
    tensors[up][0, 0] = math.nan
    save_file(tensors, tmp_path / "a.safetensors")
    options = ("--rank", "2", "--allow", "nonfinite", "-o", tmp_path / "b.safetensors")
    result = run("resize", tmp_path / "a.safetensors", *options, columns=200)
    assert result.exit_code == 0, result.stderr
    stayed = [line for line in result.stdout.splitlines() if "as it was" in line]
    assert len(stayed) == 2
    assert "216 whole delta" in stayed[0] and "a share of the others" in stayed[0]
    assert "1 module with numbers that are not finite" in stayed[1]
