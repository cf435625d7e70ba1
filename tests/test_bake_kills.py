"""A program that is killed while it bakes leaves the old or the new, and the next run leaves nothing else."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bake_cases import adapter, base_tensors, lora, model_folder, numbers
from safetensors.torch import save_file

from adapterkit.operations.unbake import restore

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")

# Loads everything once, then bakes in a fork of itself for each line and kills it after so many seconds;
# 0 lets it finish.
BAKER = """
import os, signal, sys, time
from adapterkit.operations import bake_files
from adapterkit.operations.bake import BakeOptions, bake

print("ready", flush=True)
for line in sys.stdin:
    base, adapter, output, resume, seconds = line.rstrip().split("|")
    child = os.fork()
    if not child:
        options = BakeOptions(in_place=True, force=True, keep_undo=True, resume=resume == "1")
        try:
            bake(base, [adapter], output, options)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    if float(seconds):
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Baker:
    """Bakes in programs of their own, some of which are killed."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", BAKER]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._answer()

    def bake(
        self, base: Path, path: Path, output: Path, *, resume: bool = False, seconds: float = 0.0
    ) -> int:
        assert self._process.stdin
        self._process.stdin.write(f"{base}|{path}|{output}|{int(resume)}|{seconds}\n")
        self._process.stdin.flush()
        return int(self._answer())

    def close(self) -> str:
        return self._process.communicate()[1]

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def large_tensors() -> dict[str, torch.Tensor]:
    """A base that takes some tenths of a second to write."""
    more = {f"model.extra.{index}.weight": numbers(256, 1024, seed=index) for index in range(6)}
    return {**base_tensors(), **more}


KILLS = 8
CASES = ["a file", "a file in place", "a folder", "a folder in place", "a folder, resumed"]


@pytest.fixture(scope="module")
def baker() -> Iterator[Baker]:
    baker = Baker()
    yield baker
    assert not baker.close()


def outputs(made: Path, name: str) -> dict[str, bytes]:
    """What lies under a name: a file, or the files of a folder."""
    return {key: raw for key, raw in contents(made).items() if key.split("/")[0] == name}


@pytest.mark.parametrize("case", CASES)
def test_a_bake_killed_at_random_moments_leaves_the_old_or_the_new(
    case: str, baker: Baker, tmp_path: Path
) -> None:
    made, resume = tmp_path / "made", "resumed" in case
    made.mkdir()
    if "folder" in case:
        base = model_folder(made / "base", large_tensors(), shards=3)
    else:
        base = made / "base.safetensors"
        save_file(large_tensors(), base)
    path = adapter(tmp_path / "a", lora(1))
    old = contents(made)
    output = base if "in place" in case else base.with_name("out" + base.suffix)
    assert baker.bake(base, path, made / ("whole" + base.suffix)) == 0
    (made / f"whole{base.suffix}.undo").unlink()
    found = outputs(made, "whole" + base.suffix)
    whole = {name.replace("whole", output.stem): raw for name, raw in found.items()}
    chance, killed = random.Random(case), 0
    for _ in range(KILLS):
        killed += baker.bake(base, path, output, resume=resume, seconds=chance.uniform(0.005, 0.25)) != 0
        assert outputs(made, output.name) in ({} if output != base else old, whole)
        _restore(made, old, output, base)
    assert killed
    assert baker.bake(base, path, output, resume=resume) == 0
    assert {name.split("/")[0] for name in contents(made)} == {
        *(base.name, "whole" + base.suffix, output.name, output.name + ".undo")
    }
    assert outputs(made, output.name) == whole
    restore(output, None, made / ("again" + base.suffix))
    again = outputs(made, "again" + base.suffix)
    assert {name.replace("again", base.stem): raw for name, raw in again.items()} == old


def _restore(made: Path, old: dict[str, bytes], output: Path, base: Path) -> None:
    """The base as it was, and no output."""
    for name in contents(made):
        if name.split("/")[0] == output.name and name not in old:
            (made / name).unlink()
    if output != base and output.is_dir():
        output.rmdir()
    for name, raw in old.items():
        if (made / name).read_bytes() != raw:
            (made / name).write_bytes(raw)
