"""How a command ends: exit codes, errors in words and in JSON, streams, signals, and what it loads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_support import document, flux, run, unknown, web_page, with_stranger

from adapterkit.errors import Conflict, StoreError, UsageError, VerificationFailed

ADAPTERKIT = [sys.executable, "-m", "adapterkit"]


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return flux(tmp_path / "style.safetensors")


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The program as a shell runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*ADAPTERKIT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, env=environment)


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{}"),
        ("inspect", "{}", "{}"),
        ("convert", "{}", "--to", "kohya", "--plan"),
        ("convert", "{}", "--to", "kohya", "-o", "{}.out"),
        ("diff", "{}", "{}"),
        ("formats",),
        ("explain", "kohya"),
    ],
)
def test_json_is_one_document_and_nothing_else(style: Path, arguments: tuple[str, ...]) -> None:
    result = run(*(text.format(style) for text in arguments), "--json")
    assert result.exit_code == 0
    assert document(result)["command"] in {*arguments, "plan"}
    assert not result.stderr


def test_an_error_in_json_has_its_code_message_hint_and_details(tmp_path: Path) -> None:
    path = with_stranger(tmp_path / "x.safetensors")
    result = run("convert", path, "--to", "kohya", "-o", tmp_path / "y", "--json")
    assert result.exit_code == 1
    assert not result.stderr
    found = document(result)
    assert (found["error"], found["code"]) == ("Refused", "unclaimed")
    assert found["details"] == {"keys": ["odd.thing"]}
    assert "--allow unclaimed" in str(found["hint"])
    assert "1 of 4 tensors" in str(found["message"])


def test_bad_usage_is_json_as_well(style: Path) -> None:
    result = run("inspect", style, "--bogus", "--json")
    assert (result.exit_code, document(result)["code"]) == (2, "usage")


def test_in_a_list_the_error_of_one_file_is_its_entry(style: Path, tmp_path: Path) -> None:
    result = run("inspect", web_page(tmp_path / "page"), style, "--json")
    assert result.exit_code == 2
    bad, good = document(result)["files"]  # type: ignore[misc]
    assert (bad["code"], good["family"]) == ("web-page", "flux1")  # type: ignore[index, call-overload]


def test_what_json_cannot_say_is_a_string(style: Path, tmp_path: Path) -> None:
    from cli_support import PROJ, lora
    from safetensors.torch import save_file

    save_file(lora(PROJ.format(0), 3072, 3072, 1.0), tmp_path / "part.safetensors")
    found = document(run("diff", style, tmp_path / "part.safetensors", "--json"))
    assert found["modules"][0]["error"] == "inf"  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect", "missing.safetensors"), 2),
        (("inspect",), 2),
        (("inspect", "x", "--bogus"), 2),
        (("bogus",), 2),
        (("convert", "x.safetensors", "--to", "kohya"), 2),
        (("convert", "x.safetensors", "--to", "kohia", "-o", "y"), 2),
        (("convert", "x.safetensors", "-o", "y"), 2),
        (("convert", "x.safetensors", "--to", "kohya", "-o", "y", "--dtype", "fp8"), 2),
        (("diff", "x.safetensors"), 2),
        (("diff", "x", "y", "--tolerance", "-1"), 2),
        (("inspect", "x", "--family", "sdxi"), 2),
        (("explain", "nonsense"), 2),
        (("--version",), 0),
        (("inspect", "--help"), 0),
        (("convert", "-h"), 0),
    ],
)
def test_bad_usage_ends_with_2_and_a_short_message(arguments: tuple[str, ...], code: int) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert bool(code) == result.stderr.startswith("error[")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 8


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (StoreError("x"), 2),
        (Conflict("x"), 1),
        (VerificationFailed("x"), 3),
        (ZeroDivisionError("x"), 3),
        (PermissionError(13, "Permission denied", "/root/x"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterkit.operations.diff.diff", lambda *a, **k: _raise(error))
    assert run("diff", "a", "b").exit_code == code
    monkeypatch.setattr("adapterkit.operations.sources.store_of", lambda *a: _raise(error))
    assert run("inspect", "a", "b").exit_code == code


def _raise(error: BaseException) -> None:
    raise error


def test_a_fault_of_ours_says_so_and_shows_where_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.operations.diff.diff", lambda *a, **k: 1 // 0)
    result = run("diff", "a", "b")
    assert "error[fault]: this is a fault of adapterkit: ZeroDivisionError" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in run("diff", "a", "b", "-v").stderr


def test_an_unexpected_failure_of_one_file_does_not_stop_the_others(
    style: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.operations.inspect import inspect

    def fragile(store: object, **options: object) -> object:
        return 1 // 0 if "bad" in str(store.path) else inspect(store)  # type: ignore[attr-defined]

    monkeypatch.setattr("adapterkit.operations.inspect.inspect", fragile)
    result = run("inspect", flux(style.with_name("bad.safetensors")), style)
    assert result.exit_code == 3
    assert "LoRA for FLUX.1" in result.stdout
    assert "error[fault]" in result.stderr


def test_verbose_gives_the_facts_behind_an_error(tmp_path: Path) -> None:
    path = with_stranger(tmp_path / "x.safetensors")
    assert 'details: {"keys": ["odd.thing"]}' in run("convert", path, "--to", "kohya", "--plan", "-v").stderr


def test_results_go_to_stdout_and_complaints_to_stderr(style: Path, tmp_path: Path) -> None:
    result = process("inspect", style, unknown(tmp_path / "x.safetensors"))
    assert result.returncode == 2
    assert b"FLUX.1" in result.stdout
    assert b"error" not in result.stdout
    assert result.stderr.startswith(b"error[unrecognized]")


def test_a_reader_that_goes_away_ends_the_command_quietly(style: Path) -> None:
    with subprocess.Popen(
        [*ADAPTERKIT, "inspect", str(style), "--keys"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_behind_stdout_is_an_error(style: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*ADAPTERKIT, "inspect", str(style)], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr.startswith(b"error[system]")) == (2, True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_conversion_and_leaves_nothing_behind(
    number: int, code: int, style: Path, tmp_path: Path
) -> None:
    # A reader that stops at the first tensor holds the conversion in the middle of writing.
    script = (
        "import sys, time, adapterkit.plan as plan\n"
        "def slow(*a):\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "plan.Plan._checked = slow\n"
        "from adapterkit.cli import main\nmain()\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["convert", str(style), "--to", "diffusers", "-o", str(out / "x.safetensors")]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"writing\n"
        time.sleep(0.1)
        running.send_signal(number)
        assert running.wait() == code
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{}", "--keys", "--metadata"),
        ("convert", "{}", "--to", "diffusers", "--plan"),
        ("explain", "kohya"),
        ("inspect", "nö→.safetensors"),
        ("formats",),
    ],
)
def test_any_encoding_of_the_terminal_will_do(style: Path, arguments: tuple[str, ...], encoding: str) -> None:
    flux(style, note="für → 日本")
    result = run(*(text.format(style) for text in arguments), charset=encoding)
    assert result.exit_code in (0, 2)
    assert isinstance(result.exception, SystemExit | None)
    assert "Traceback" not in result.stderr
    (result.stdout + result.stderr).encode(encoding)


def test_the_program_runs_in_the_locale_c(style: Path) -> None:
    result = process(
        "inspect", style, "nö", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C", TERM="dumb"
    )
    assert result.returncode == 2
    assert b"LoRA for FLUX.1" in result.stdout
    assert result.stderr.startswith(b"error[no-file]: n")


@pytest.mark.parametrize("command", [(), ("inspect",), ("convert",), ("diff",), ("formats",), ("explain",)])
def test_help_is_plain_ascii(command: tuple[str, ...]) -> None:
    assert run(*command, "--help").stdout.isascii()


COLOR = {"FORCE_COLOR": "1", "NO_COLOR": "", "TERM": "xterm-256color"}


def test_colours_are_there_on_a_terminal_and_go_when_not_wanted(style: Path) -> None:
    assert "\x1b[" in run("inspect", style, env=COLOR).stdout
    assert "\x1b" not in run("inspect", style, "--no-color", env=COLOR).stdout
    assert "\x1b" not in run("--no-color", "inspect", style, env=COLOR).stdout
    assert "\x1b" not in run("inspect", style, env={**COLOR, "NO_COLOR": "1"}).stdout
    assert "\x1b" not in run("inspect", style, env={"NO_COLOR": ""}).stdout


def test_colours_do_not_change_the_words(style: Path) -> None:
    import re

    colored = run("inspect", style, env=COLOR).stdout
    plain = re.sub("\x1b\\[[0-9;]*m", "", colored)
    stripped = [line.rstrip() for line in plain.splitlines()]
    assert stripped == run("inspect", style).stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (("--version",), {"torch", "rich", "numpy", "adapterkit.stores"}),
        (("convert", "--help"), {"torch", "rich", "adapterkit.stores"}),
        (("inspect", "{}", "--keys"), {"torch", "numpy", "rich.markdown", "rich.progress"}),
        (("formats",), {"torch", "numpy"}),
        (("explain", "exists"), {"torch", "numpy"}),
        (("convert", "{}", "--to", "kohya"), {"torch"}),
    ],
)
def test_a_command_loads_no_more_than_it_needs(
    style: Path, arguments: tuple[str, ...], unneeded: set[str]
) -> None:
    command = [text.format(style) for text in arguments]
    script = f"import sys\nfrom adapterkit.cli.app import app\ntry:\n    app({command})\n"
    script += f"except SystemExit:\n    print('LOADED', {unneeded} & sys.modules.keys())\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, text=True)
    assert "LOADED set()" in result.stdout


def test_both_names_and_the_module_are_the_same_program() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["project"]["scripts"].items()) == {
        ("adapterkit", "adapterkit.cli:main"),
        ("akit", "adapterkit.cli:main"),
    }
    from adapterkit import __version__

    assert process("--version").stdout.decode().strip() == f"adapterkit {__version__}"
