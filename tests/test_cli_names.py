"""Names out of files and shells: shown so that they deceive nobody, and found whatever they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_support import QKV, flux, lora, run
from safetensors.torch import save_file

from adapterkit.errors import StoreError

EVIL = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "a\rb",
    "a\x08b",
    "\u202egnp.exe",
    "zero\u200bwidth",
    "\x9b31m",
]
MARKUP = ["[bold]x[/bold]", "[link=file:///etc]x[/link]", ":smile:", "[/]", "100%"]


def printable(text: str) -> bool:
    return all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("text", EVIL)
def test_metadata_cannot_drive_the_terminal(text: str, columns: int, tmp_path: Path) -> None:
    path = flux(tmp_path / "x.safetensors", ss_output_name=text, **{"modelspec.title": text, "other": text})
    color = {"FORCE_COLOR": "1", "NO_COLOR": "1"}
    result = run("inspect", path, "--metadata", columns=columns, env=color)
    assert result.exit_code == 0
    assert printable(result.stdout)


@pytest.mark.parametrize("text", MARKUP)
def test_metadata_and_paths_are_no_markup(text: str, tmp_path: Path) -> None:
    name = f"{text.replace('/', '')}.safetensors"
    path = flux(tmp_path / name, ss_output_name=text)
    result = run("inspect", path, columns=300)
    assert f"output_name {text}" in result.stdout
    assert name in result.stdout


def test_keys_are_no_markup(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = lora(QKV.format(0), 9216, 3072, 1.0)
    save_file({**tensors, "[red]odd[/red].thing": tensors[QKV.format(0) + ".alpha"].clone()}, path)
    assert "[red]odd[/red].thing" in run("inspect", path, "--keys", columns=200).stdout
    refused = run("convert", path, "--to", "kohya", "-o", tmp_path / "y", columns=200)
    assert "`[red]odd[/red].thing`" in refused.stderr


@pytest.mark.parametrize(
    "name",
    ["with space", "new\nline", "emoji 🎨", "-x", "quote'\"", "ünïcode", "x" * 200, "dots..", "[b]", "a;b&c"],
)
def test_unusual_paths_work_throughout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flux(Path(f"{name}.safetensors"))
    source = f"./{name}.safetensors"
    assert run("inspect", source).exit_code == 0
    assert run("convert", source, "--to", "comfyui", "-o", f"./{name}.out").exit_code == 0
    result = run("diff", source, f"./{name}.out")
    assert result.exit_code == 0
    assert printable(run("inspect", source, "-v").output)


def test_a_path_that_begins_with_a_dash_stands_behind_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flux(Path("-x.safetensors"))
    assert run("inspect", "--", "-x.safetensors").exit_code == 0


@pytest.mark.parametrize("name", ["no\nsuch", "bad \udcff\udcfe byte", "\x1b[31m", "x" * 5000, "nul\0"])
def test_a_path_that_is_not_there_is_named_in_printable_words(name: str) -> None:
    result = run("inspect", name)
    assert result.exit_code == 2
    assert result.stderr.startswith("error[")
    assert printable(result.stderr)


@pytest.mark.parametrize("text", [*EVIL, "new\nline"])
def test_a_file_name_stands_on_one_printable_line(text: str, tmp_path: Path) -> None:
    flux(tmp_path / f"{text.replace('/', '')}.safetensors")
    (path,) = tmp_path.iterdir()
    first, *_ = run("inspect", path, columns=500).stdout.splitlines()
    assert first.isprintable()
    assert first.endswith(".safetensors")


@pytest.mark.parametrize("text", [*EVIL, "new\nline"])
def test_a_message_that_quotes_a_file_is_printable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise StoreError(f"bad `{text}`", hint=f"not `{text}`")

    monkeypatch.setattr("adapterkit.operations.diff.diff", refuse)
    message, hint = run("diff", "a", "b", columns=500).stderr.splitlines()
    assert message.startswith("error[store]: bad `")
    assert (message + hint).isprintable()
