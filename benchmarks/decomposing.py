"""What cutting one layer's change to a rank costs: a dense SVD, as the peers take it, and adapterkit.

    python benchmarks/decomposing.py [--rank 64] [--threads 1 2] [--device cuda]

Dense changes (singular values σ_i ~ i^-½ in full rank, and 2 % noise) are cut to the rank by
torch.linalg.svd in float32 with full matrices, as sd-scripts and PEFT do it, and with thin ones, as
mergekit does; and by `decompose`, which looks for the leading values only. LoRAs of rank 64 in fp16 are
cut to 16 by `decompose` through their factors, which the peers multiply out for the same dense SVD, to
whose time theirs is compared. Each way runs in a process of its own; `excess` is by how much its
error is above the least possible one, `memory` the growth of its peak while it runs (Linux only).
With several threads adapterkit decomposes as many changes at once, and the time of one is told.
Seconds are of the clock, and of the processor, which a busy machine lengthens less; but threads of a
dense SVD that wait for each other spend those as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapterkit.decompose import decompose
from adapterkit.deltas import LowRank, Whole

SHAPES = {
    "1280x1280": (1280, 1280),
    "10240x1280": (10240, 1280),
    "1280x1280x3x3": (1280, 11520),
    "4096x4096": (4096, 4096),
}
RANKS, KEPT = 64, 16
FULL, THIN, FACTORS = "dense, full matrices", "dense, thin", "adapterkit, factors"


def change_of(shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    (o, n), short = shape, min(shape)
    left, right = torch.randn(o, short, generator=generator), torch.randn(short, n, generator=generator)
    change = (left * torch.arange(1, short + 1) ** -0.5) @ right
    return change + 0.02 * change.square().mean().sqrt() * torch.randn(o, n, generator=generator)


Cut = tuple[Tensor, Tensor, Tensor]
Way = Callable[[Tensor, int, str], tuple[Cut, int]]


def dense(change: Tensor, rank: int, device: str, full: bool) -> tuple[Cut, int]:
    u, values, vt = torch.linalg.svd(change.to(device), full_matrices=full)
    return (u[:, :rank].cpu(), values[:rank].cpu(), vt[:rank].cpu()), 1


def leading(change: Tensor, rank: int, device: str, exact: bool) -> tuple[Cut, int]:
    count = torch.get_num_threads()
    found = decompose(dict.fromkeys(range(count), Whole(change)), most=rank, exact=exact, device=device)
    cuts = [(one.vectors(rank), one.values) for one in found.values()]
    (u, vt), values = cuts[0]
    return (u, values, vt), count


def factored(change: Tensor, rank: int, device: str) -> tuple[Cut, int]:
    """Of as many LoRAs as take long enough to be timed; `change` tells the shape alone."""
    (o, n), count = change.shape, 20 * torch.get_num_threads()
    up, down = torch.randn(o, RANKS).half(), torch.randn(RANKS, n).half()
    found = decompose(dict.fromkeys(range(count), LowRank(up, down)), most=rank, device=device)
    cuts = [(one.factors(rank), one.values) for one in found.values()]
    return (cuts[0][0][0], cuts[0][1], cuts[0][0][1]), count


WAYS: Mapping[str, Way] = {
    FULL: partial(dense, full=True),
    THIN: partial(dense, full=False),
    "adapterkit": partial(leading, exact=False),
    "adapterkit, exact": partial(leading, exact=True),
    FACTORS: factored,
}


def peak() -> int:
    """In bytes, since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def forget_peak() -> None:
    """See proc(5); without it the imports' and the input's own peak would be taken for the work's."""
    Path("/proc/self/clear_refs").write_text("5")


def work(way: str, path: Path, rank: int, threads: int, device: str) -> dict[str, float]:
    torch.set_num_threads(threads)
    change = torch.from_numpy(np.load(path))
    WAYS[way](torch.randn(200, 200), 16, device)
    forget_peak()
    before, began, busy = peak(), time.perf_counter(), time.process_time()
    cut, count = WAYS[way](change, rank, device)
    seconds, processor = (time.perf_counter() - began) / count, (time.process_time() - busy) / count
    memory = peak() - before
    left = 0.0
    if way != FACTORS:
        u, values, vt = (part.double() for part in cut)
        left = float(torch.linalg.vector_norm(change.double() - (u * values) @ vt))
    return {"seconds": seconds, "processor": processor, "memory": memory, "left": left}


def measured(way: str, path: Path, rank: int, threads: int, device: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", way, str(path), str(rank), str(threads), device]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print(f"cut to rank {arguments.rank} (LoRAs of rank {RANKS}: to {KEPT}) on {where}")
    print(f"{'change':14} {'threads':>7}  {'way':20} {'seconds':>9} {'of full':>8}", end="")
    print(f" {'processor':>10} {'of full':>8} {'memory':>8} {'excess':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            path = Path(folder) / f"{name}.npy"
            np.save(path, change_of(shape).numpy())
            for threads in arguments.threads:
                show(name, threads, path, arguments.rank, arguments.device)
            path.unlink()


def show(name: str, threads: int, path: Path, rank: int, device: str) -> None:
    found = {way: measured(way, path, KEPT if way == FACTORS else rank, threads, device) for way in WAYS}
    for way, one in found.items():
        wall, busy = (found[FULL][unit] / one[unit] for unit in ("seconds", "processor"))
        excess = "" if way == FACTORS else f"{max(0.0, one['left'] / found[THIN]['left'] - 1):.1e}"
        print(
            f"{name:14} {threads:7}  {way:20} {one['seconds']:8.4f}s {wall:7.1f}x {one['processor']:9.4f}s"
            f" {busy:7.1f}x {one['memory'] / 1e6:5.0f} MB {excess:>8}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        _, _, way, path, rank, threads, device = sys.argv
        print(json.dumps(work(way, Path(path), int(rank), int(threads), device)))
    else:
        main()
