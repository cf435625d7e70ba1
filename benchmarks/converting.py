"""How long a Flux adapter takes from kohya to diffusers: adapterkit, `cp`, and diffusers itself.

    python benchmarks/converting.py FOLDER [--runs 5]

Each way runs in a process of its own, which imports everything first; then only the work is timed,
and the growth of its peak memory over what the imports took is read. `cp` copies adapterkit's
output: what writing that many bytes costs at the least; `cp, synced` also waits for the disk, as
adapterkit does. diffusers' way is its own converter followed by safetensors' save_file; it needs
the test extras, and drops the T5 and writes no scale metadata.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


def ours(verify: str) -> Callable[[Path, Path], None]:
    from adapterkit import ConvertOptions, convert

    def run(source: Path, output: Path) -> None:
        convert(source, "diffusers", output, ConvertOptions(force=True, verify=verify))  # type: ignore[arg-type]

    return run


def copy(synced: bool) -> Callable[[Path, Path], None]:
    def run(source: Path, output: Path) -> None:
        shutil.copyfile(source, output)
        if synced:
            with output.open("rb+") as file:
                os.fsync(file.fileno())

    return run


def theirs() -> Callable[[Path, Path], None]:
    import safetensors.torch
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    def run(source: Path, output: Path) -> None:
        state = safetensors.torch.load_file(source)
        # Its converter refuses what it does not know; the text encoders it does not carry.
        kept = {key: value for key, value in state.items() if not key.startswith("lora_te3")}
        converted = _convert_kohya_flux_lora_to_diffusers(kept)
        safetensors.torch.save_file({k: v.contiguous().clone() for k, v in converted.items()}, output)

    return run


WAYS: dict[str, Callable[[], Callable[[Path, Path], None]]] = {
    "adapterkit, verified": lambda: ours("sample"),
    "adapterkit, unverified": lambda: ours("none"),
    "cp": lambda: copy(False),
    "cp, synced": lambda: copy(True),
    "diffusers": theirs,
}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(way: str, source: Path, output: Path) -> None:
    run = WAYS[way]()
    before = peak()
    began = time.perf_counter()
    run(source, output)
    print(json.dumps({"seconds": time.perf_counter() - began, "memory": peak() - before}))


def measured(way: str, source: Path, output: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", way, str(source), str(output)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    source = arguments.folder / "flux_kohya.safetensors"
    output, scratch = (
        arguments.folder / "flux_diffusers.safetensors",
        arguments.folder / "scratch.safetensors",
    )
    measured("adapterkit, verified", source, output)
    rounds = []
    for _ in range(arguments.runs):
        rounds.append(
            {way: measured(way, output if way.startswith("cp") else source, scratch) for way in WAYS}
        )
    size = output.stat().st_size
    print(f"flux_kohya.safetensors ({source.stat().st_size / 1e6:.0f} MB) to diffusers ({size / 1e6:.0f} MB)")
    print(f"{'way':24} {'seconds':>9} {'of cp':>7} {'of cp, synced':>14} {'memory grown':>13}")
    for way in WAYS:
        seconds = median(r[way]["seconds"] for r in rounds)
        of_cp = median(r[way]["seconds"] / r["cp"]["seconds"] for r in rounds)
        of_synced = median(r[way]["seconds"] / r["cp, synced"]["seconds"] for r in rounds)
        memory = median(r[way]["memory"] for r in rounds) / 1e6
        print(f"{way:24} {seconds:8.3f}s {of_cp:7.2f} {of_synced:14.2f} {memory:10.0f} MB")
    scratch.unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
