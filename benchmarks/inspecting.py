"""How long `adapterkit inspect` takes, as a multiple of starting Python with click, rich and numpy.

    python benchmarks/inspecting.py FOLDER [--runs 9]

Whole processes are timed, in turn, so that both see the same machine. The goal is a ratio of 2.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

START = [sys.executable, "-c", "import click, rich.console, rich.table, numpy"]


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{'file':28} {'start-up':>10} {'inspect':>10} {'ratio':>7}")
    for path in sorted(arguments.folder.glob("*_kohya.safetensors")):
        inspect = [sys.executable, "-m", "adapterkit", "inspect", str(path)]
        for command in (START, inspect):
            seconds(command)
        pairs = [(seconds(START), seconds(inspect)) for _ in range(arguments.runs)]
        start, ours = (median(column) for column in zip(*pairs, strict=True))
        ratio = median(b / a for a, b in pairs)
        print(f"{path.name:28} {start:9.3f}s {ours:9.3f}s {ratio:7.2f}")


if __name__ == "__main__":
    main()
