"""Files, folders and places that are wrong, through the front door: what the command line says and leaves.

How the stores find these faults is tested where the stores are; here it is what somebody sees.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from front_door import (
    CONFIG,
    Fault,
    check_error,
    check_fault,
    contents,
    diffusers,
    kohya,
    peft_folder,
    raw,
    run,
    write,
)
from hostile import BROKEN_SAFETENSORS, NOT_TENSORS
from hostile_pickles import attacks, state_dict, tensor, torch_zip

from adapterkit.adapter import Adapter
from adapterkit.errors import Json
from adapterkit.operations import convert as convert_module
from adapterkit.plan import Options, Plan, make_plan
from adapterkit.specs.families import Target
from adapterkit.stores import write_json

ADAPTERKIT = [sys.executable, "-m", "adapterkit"]


def good(path: Path) -> Path:
    return write(path, kohya())


# --- bytes ----------------------------------------------------------------------------------------

BYTES = [
    *(Fault(name, raw(data), code, (says,)) for name, data, code, says in BROKEN_SAFETENSORS),
    *(
        Fault(name, raw(data), code, (says.replace("\\\\", "\\"),), hint)
        for name, data, code, says, hint in NOT_TENSORS
    ),
]


@pytest.mark.parametrize("fault", BYTES, ids=str)
def test_bytes_that_are_no_tensor_file(fault: Fault, tmp_path: Path) -> None:
    check_fault(fault, tmp_path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_download_that_broke_off(share: float, tmp_path: Path) -> None:
    whole = good(tmp_path / "whole").read_bytes()
    fault = Fault("cut", raw(whole[: int(len(whole) * share)]), "truncated", (), "download the file again")
    check_fault(fault, tmp_path)


@pytest.mark.parametrize("name", attacks(Path("canary")))
def test_an_attack_is_named_and_nothing_of_it_is_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "in" / "canary"
    attack, says = attacks(canary)[name]
    fault = Fault(name, raw(torch_zip(attack), "style.pt"), "unsafe", (says,), "safetensors")
    check_fault(fault, tmp_path)
    assert not canary.exists()


def archive(**members: bytes) -> bytes:
    """A file of torch.save with further members in it."""
    buffer = io.BytesIO(torch_zip(state_dict(tensor((6,), (1,), 6)), {"0": bytes(24)}))
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as opened:
        for name, data in members.items():
            opened.writestr(name, data)
    return buffer.getvalue()


ARCHIVES = [
    Fault("a hidden pickle", raw(archive(**{"archive/other.pkl": b"x"}), "a.pt"), "unsafe", ("other.pkl",)),
    Fault("a way out", raw(archive(**{"archive/../../x": b"x"}), "a.pt"), "unsafe", ("leaves the archive",)),
    Fault("a cut archive", raw(archive()[:-30], "a.pt"), "archive", (), "download"),
    Fault("no names", raw(torch_zip(b"\x80\x02K\x01."), "a.pt"), "no-names", ("not named tensors",)),
]


@pytest.mark.parametrize("fault", ARCHIVES, ids=str)
def test_torch_files_that_are_wrong(fault: Fault, tmp_path: Path) -> None:
    check_fault(fault, tmp_path)


@pytest.mark.parametrize(
    ("name", "save"),
    [("style.safetensors", torch.save), ("style.pt", write)],
    ids=["a pickle named .safetensors", "a safetensors named .pt"],
)
def test_a_suffix_that_lies_is_said_and_the_file_read(
    name: str, save: Callable[..., object], tmp_path: Path
) -> None:
    path = tmp_path / name
    save(path, kohya()) if save is write else save(kohya(), path)
    result = run("convert", path, "--to", "diffusers", "-o", tmp_path / "new.safetensors")
    assert result.exit_code == 0, result.output
    assert "note: " in result.stdout and "named" in result.stdout
    assert run("diff", path, tmp_path / "new.safetensors").exit_code == 0


# --- paths and places -----------------------------------------------------------------------------

UNUSUAL = [
    "with spaces.safetensors",
    "🎨 стиль.safetensors",
    "two\nlines.safetensors",
    "a" * 230 + ".st",
    "'\"$;&.st",
]


@pytest.mark.parametrize("name", UNUSUAL, ids=ascii)
def test_unusual_paths_are_read_written_and_shown_safely(name: str, tmp_path: Path) -> None:
    path, new = good(tmp_path / name), tmp_path / ("new " + name[-200:])
    result = run("convert", path, "--to", "diffusers", "-o", new)
    assert result.exit_code == 0, result.output
    assert new.is_file()
    assert "two\nlines" not in result.stdout
    again = run("convert", path, "--to", "diffusers", "-o", new)
    assert again.exit_code == 2
    assert again.stderr.startswith("error[exists]: ") and "two\nlines" not in again.stderr


def test_a_name_like_an_option_is_a_name_behind_two_dashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good(tmp_path / "-x.safetensors")
    monkeypatch.chdir(tmp_path)
    assert run("convert", "--to", "diffusers", "-o", "new.safetensors", "--", "-x.safetensors").exit_code == 0


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nothing.safetensors", "no-file"),
        ("a\0b", "system"),
        ("x" * 300, "system"),
        (os.devnull, "special-file"),
    ],
    ids=ascii,
)
def test_paths_that_lead_nowhere(path: str, code: str, tmp_path: Path) -> None:
    for result in (run("inspect", path), run("convert", path, "--to", "kohya", "-o", tmp_path / "new")):
        assert (result.exit_code, result.stdout) == (2, "")
        error, hint = result.stderr.splitlines()
        assert error.startswith(f"error[{code}]: ") and hint.startswith("hint: ")
    assert not contents(tmp_path)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize(
    ("output", "code"), [("", "usage"), ("a\0b", "system"), ("x" * 300, "system")], ids=ascii
)
def test_outputs_that_can_be_no_path(
    output: str, code: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = good(tmp_path / "style.safetensors")
    monkeypatch.chdir(tmp_path)
    result = run("convert", source, "--to", to, "-o", output)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error[{code}]: ") and "\nhint: " in result.stderr
    assert set(contents(tmp_path)) == {"style.safetensors"}


def test_an_empty_path_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(tmp_path / "style.safetensors")
    monkeypatch.chdir(tmp_path)
    for command in (["inspect", ""], ["convert", "", "--to", "kohya", "-o", "new"], ["diff", "", ""]):
        result = run(*command)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "the path of the input is empty" in result.stderr
    assert set(contents(tmp_path)) == {"style.safetensors"}


def itself(folder: Path) -> Path:
    return folder / "style.safetensors"


def symbolic(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "style.safetensors")
    return folder / "link"


def hard(folder: Path) -> Path:
    (folder / "link").hardlink_to(folder / "style.safetensors")
    return folder / "link"


@pytest.mark.parametrize("name", [itself, symbolic, hard], ids=lambda way: way.__name__)
def test_the_input_is_not_overwritten_unasked_by_whatever_name(
    name: Callable[[Path], Path], tmp_path: Path
) -> None:
    source = good(tmp_path / "style.safetensors")
    output = name(tmp_path)
    before = contents(tmp_path)
    result = run("convert", source, "--to", "diffusers", "-o", output)
    assert result.exit_code == 2
    assert f"error[exists]: {output}: is the input itself" in result.stderr
    assert contents(tmp_path) == before
    assert run("convert", source, "--to", "diffusers", "-o", output, "--force").exit_code == 0
    assert run("diff", output, good(tmp_path / "again")).exit_code == 0


@pytest.mark.parametrize("name", [itself, symbolic, hard], ids=lambda way: way.__name__)
def test_a_folder_is_not_written_over_its_own_files(name: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "adapter")
    before = contents(tmp_path)
    result = run("convert", folder, "--to", "peft", "-o", folder)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is the input itself" in result.stderr
    assert contents(tmp_path) == before


def a_file(place: Path) -> str:
    place.write_bytes(b"mine")
    return str(place)


def below_a_file(place: Path) -> str:
    return f"{a_file(place)}/new"


def nowhere(place: Path) -> str:
    return str(place / "no" / "new")


def a_device(place: Path) -> str:
    return os.devnull


def a_pipe(place: Path) -> str:
    os.mkfifo(place)
    return str(place)


def a_folder_of_that_name(place: Path) -> str:
    (place / "style.diffusers.safetensors").mkdir(parents=True)
    return str(place)


def half_of_a_folder(place: Path) -> str:
    place.mkdir()
    (place / "adapter_config.json").write_text("{}")
    return str(place)


PLACES = [
    (a_file, "diffusers", "exists", "--force replaces it"),
    (below_a_file, "diffusers", "no-folder", "create"),
    (nowhere, "diffusers", "no-folder", "create the folder first"),
    (a_device, "diffusers", "special-file", "file"),
    (a_pipe, "diffusers", "special-file", "file"),
    (a_folder_of_that_name, "diffusers", "special-file", "name a file"),
    (a_file, "peft", "special-file", "name a folder"),
    (below_a_file, "peft", "special-file", "name a folder"),
    (a_device, "peft", "special-file", "name a folder"),
    (half_of_a_folder, "peft", "exists", "--force replaces it"),
]


@pytest.mark.parametrize(
    ("make", "to", "code", "hint"), PLACES, ids=[f"{make.__name__}, {to}" for make, to, *_ in PLACES]
)
def test_places_that_cannot_be_written(
    make: Callable[[Path], str], to: str, code: str, hint: str, tmp_path: Path
) -> None:
    source = good(tmp_path / "style.safetensors")
    output = make(tmp_path / "place")
    before = contents(tmp_path)
    fault = Fault("", good, code, (), hint)
    check_error(fault, Path(output), run("convert", source, "--to", to, "-o", output), 2)
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_folder_that_may_not_be_written(to: str, tmp_path: Path) -> None:
    source = good(tmp_path / "style.safetensors")
    (tmp_path / "locked").mkdir(mode=0o555)
    result = run("convert", source, "--to", to, "-o", tmp_path / "locked" / "new")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "permission denied" in result.stderr and "hint: " in result.stderr


@pytest.mark.parametrize("to", ["peft", "diffusers"])
def test_folders_made_for_results_go_when_there_are_none(to: str, tmp_path: Path) -> None:
    sources = [raw(b"no", name)(tmp_path) for name in ("one.safetensors", "two.safetensors")]
    before = contents(tmp_path)
    result = run("convert", *sources, "--to", to, "-o", tmp_path / "some" / "where")
    assert result.exit_code == 2
    assert contents(tmp_path) == before


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """The second component fails when the first one is written already."""
    tensors = diffusers()
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors |= {name.format("A"): torch.ones(4, 768), name.format("B"): torch.full((768, 4), torch.nan)}
    source = write(tmp_path / "style.safetensors", tensors)
    (tmp_path / "there").mkdir()
    before = contents(tmp_path)
    for place in (tmp_path / "new" / "one", tmp_path / "there"):
        result = run("convert", source, "--to", "peft", "-o", place)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error[nonfinite]: {source}: `text_encoder.text_model")
        assert contents(tmp_path) == before
        assert run("convert", source, "--to", "peft", "-o", place, "--allow", "nonfinite").exit_code == 0
        written = contents(place)
        assert {f"{part}/{file}" for part in ("unet", "text_encoder") for file in CONFIG_AND_WEIGHTS} < set(
            written
        )
        assert not any("tmp" in name for name in written)
        before = contents(tmp_path)


CONFIG_AND_WEIGHTS = ("adapter_config.json", "adapter_model.safetensors")


# --- programs beside ours -------------------------------------------------------------------------


def process(*arguments: str | Path, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*ADAPTERKIT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_programs_writing_one_folder_leave_one_of_theirs(tmp_path: Path) -> None:
    sources = [write(tmp_path / f"{n}.safetensors", kohya(alpha=float(n))) for n in (1, 2)]
    for source in sources:
        assert run("convert", source, "--to", "peft", "-o", f"{source}.alone").exit_code == 0
    both = [
        process("convert", source, "--to", "peft", "-o", tmp_path / "new", "--force") for source in sources
    ]
    codes = [one.wait(60) for one in both]
    for one in both:
        one.communicate()
    assert 0 in codes
    assert contents(tmp_path / "new") in [contents(Path(f"{source}.alone")) for source in sources]
    assert not list(tmp_path.rglob(".adapterkit*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_folder_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    rank = 512
    tensors = {
        f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{side}.weight": torch.zeros(*shape)
        for layer in range(8)
        for side, shape in (("A", (rank, 2048)), ("B", (2048, rank)))
    }
    source = peft_folder(tmp_path / "adapter", {**CONFIG, "r": rank}, tensors)
    before = set(contents(tmp_path))
    running = process("convert", source, "--to", "peft", "-o", tmp_path / "new")
    while running.poll() is None and not list(tmp_path.glob(".adapterkit*/*")):
        time.sleep(0.002)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=60)
    if running.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert running.returncode == 128 + number
    assert b"Traceback" not in stderr
    assert set(contents(tmp_path)) == before


def test_the_half_of_a_folder_that_a_killed_program_left_is_swept_away(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "adapter")
    left = peft_folder(tmp_path / ".adapterkit-0123.tmp")
    assert run("convert", source, "--to", "peft", "-o", tmp_path / "new").exit_code == 0
    assert not left.exists()


def test_what_another_program_wrote_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = peft_folder(tmp_path / "adapter")

    def slowly(path: Path, value: Json) -> None:
        peft_folder(tmp_path / "new", b"theirs")
        write_json(path, value)

    monkeypatch.setattr(convert_module, "write_json", slowly)
    result = run("convert", source, "--to", "peft", "-o", tmp_path / "new")
    check_error(Fault("", good, "exists", (), "--force"), tmp_path / "new", result, 2)
    assert (tmp_path / "new" / "adapter_config.json").read_bytes() == b"theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "new"}


def test_an_input_cut_short_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = good(tmp_path / "style.safetensors")

    def plan(adapter: Adapter, target: Target, options: Options | None) -> Plan:
        os.truncate(source, source.stat().st_size // 2)
        return make_plan(adapter, target, options)

    monkeypatch.setattr(convert_module, "make_plan", plan)
    result = run("convert", source, "--to", "diffusers", "-o", tmp_path / "new.safetensors")
    fault = Fault("", good, "changed", (), "again")
    check_error(fault, source, result, 2)
    assert set(contents(tmp_path)) == {"style.safetensors"}


@pytest.mark.parametrize("terminal", [{}, {"TERM": "dumb", "NO_COLOR": "1"}], ids=["terminal", "dumb"])
def test_an_error_can_be_read_on_a_narrow_terminal_without_our_characters(
    terminal: dict[str, str], tmp_path: Path
) -> None:
    path = raw(b"<!doctype html>", "🎨 two\nlines.safetensors")(tmp_path)
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "40", **terminal}
    running = process("inspect", path, **environment)
    stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout) == (2, b"")
    lines = stderr.decode("ascii").splitlines()
    assert max(map(len, lines)) <= 48  # an escape takes more columns than the character it stands for
    assert lines[0].startswith("error[web-page]:")
    assert any(line.startswith("hint: log in") for line in lines)
