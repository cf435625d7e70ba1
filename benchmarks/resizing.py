"""How long an SDXL adapter of 788 modules takes from rank 64 to 16: adapterkit, and dense SVDs.

    python benchmarks/resizing.py FOLDER [--threads 1 2] [--dense-threads 1]

The adapter has every layer of the UNet that a LoRA can change, in fp16, with singular values that fall
as a power of their number. adapterkit runs in a process of its own, which imports everything first;
then the work is timed by its parts, and the growth of its peak memory over what the imports took is
read (the mapped pages of the input count). Verification and measuring the error are part of it.

The dense way is that of sd-scripts' resize: up @ down in float32, then torch.linalg.svd with full
matrices, module by module. Each distinct shape is measured once and counted as often as it occurs; its
reading and writing are left out. Both do the same: the errors are printed beside each other.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

RANK, KEPT = 64, 16
BLOCKS = ("down_blocks", "mid_block", "up_blocks")
Shape = tuple[int, ...]


def layers() -> Iterator[tuple[str, Shape]]:
    """(module's name in a kohya file, shape of its weight) of every layer inside the UNet's blocks."""
    from adapterkit.specs.families import family

    base = family("sdxl")[0]
    network, prefix = base.network("unet"), base.target("kohya").prefixes["unet"]
    assert network is not None
    for row in network.namings[prefix.naming].rows:
        shape = network.weight_shape(row.span[0].module)
        inside = row.span[0].module.startswith(BLOCKS)
        if inside and row.param is None and shape is not None and len(shape) >= 2:
            yield prefix.text + row.native.replace(".", "_"), shape


def write(path: Path) -> None:
    """A kohya file of rank 64 whose modules differ in size and in how fast their spectra fall."""
    from adapterkit.stores import TensorInfo, canonical_order, write_safetensors

    found = dict(layers())
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (out, width, *kernel) in found.items():
        power = 0.6 + 0.6 * float(torch.rand((), generator=generator))
        size = math.exp(float(torch.randn((), generator=generator)))
        falling = size * torch.arange(1, RANK + 1) ** -power
        up = torch.randn(out, RANK, generator=generator) * out**-0.5 * falling.sqrt()
        down = torch.randn(RANK, width, *kernel, generator=generator) * falling.sqrt().reshape(
            -1, *[1] * (1 + len(kernel))
        )
        tensors[f"{name}.lora_up.weight"] = up.reshape(out, RANK, *[1] * len(kernel)).half()
        tensors[f"{name}.lora_down.weight"] = (down / math.sqrt(width * math.prod(kernel))).half()
        tensors[f"{name}.alpha"] = torch.tensor(RANK / 2)
    infos = canonical_order(
        [
            TensorInfo(key, "F16" if tensor.ndim else "F32", tuple(tensor.shape))
            for key, tensor in tensors.items()
        ]
    )
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(RANK)}
    write_safetensors(path, infos, ((info.name, tensors[info.name]) for info in infos), metadata)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(source: Path, output: Path, rule: dict[str, float], threads: int) -> None:
    """One run, timed by its parts; printed as JSON."""
    from adapterkit import RankRule, ResizeOptions, resizable

    torch.set_num_threads(threads)
    chosen = RankRule(**rule)  # type: ignore[arg-type]
    times, processor, before = {}, time.process_time(), peak()
    began = last = time.perf_counter()

    def took(part: str) -> None:
        nonlocal last
        times[part], last = time.perf_counter() - last, time.perf_counter()

    ready = resizable(source, ResizeOptions(force=True), rules=[chosen])
    took("read and decompose")
    resized = ready.at(chosen)
    took("choose ranks, make factors, plan")
    done = ready.write(resized, output)
    took("write, verify, measure the error")
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - began,
                "processor": time.process_time() - processor,
                "memory": peak() - before,
                "parts": times,
                "error": done.reduction.error,
                "measured": done.measured,
                "size": done.reduction.size,
            }
        )
    )


def dense(threads: int) -> None:
    """Seconds of wall and processor for all modules, one shape after another; printed as JSON."""
    torch.set_num_threads(threads)
    torch.linalg.svd(torch.randn(64, 64))
    counts = Counter((shape[0], math.prod(shape[1:])) for _, shape in layers())
    seconds = processor = 0.0
    for (out, width), count in sorted(counts.items()):
        generator = torch.Generator().manual_seed(0)
        up, down = torch.randn(out, RANK, generator=generator), torch.randn(RANK, width, generator=generator)
        began, spent = time.perf_counter(), time.process_time()
        torch.linalg.svd(up @ down)
        wall, used = time.perf_counter() - began, time.process_time() - spent
        print(f"{count:4} × {out}x{width}: {wall:.2f} s each", file=sys.stderr)
        seconds += count * wall
        processor += count * used
    print(json.dumps({"seconds": seconds, "processor": processor, "memory": peak()}))


def best_error(source: Path) -> float:
    """The least error there is, from float64 QR factors of each module."""
    from safetensors.torch import load_file

    tensors = load_file(source)
    left = whole = 0.0
    for name, _ in layers():
        up = tensors[f"{name}.lora_up.weight"].double().flatten(1)
        down = tensors[f"{name}.lora_down.weight"].double().flatten(1)
        core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T
        squares = 0.25 * torch.linalg.svdvals(core).square()
        left, whole = left + float(squares[KEPT:].sum()), whole + float(squares.sum())
    return math.sqrt(left / whole)


def run(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", *map(str, arguments)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def command_line(source: Path, output: Path, threads: int) -> float:
    """Seconds of the whole command, Python's and torch's start included."""
    code = (
        f"import torch; torch.set_num_threads({threads})\n"
        f"from adapterkit.cli.app import app\n"
        f"app(['resize', {str(source)!r}, '-o', {str(output)!r}, '--rank', '{KEPT}', '--force', '-q'])"
    )
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dense-threads", type=int, nargs="+", default=[1])
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source, output = arguments.folder / "sdxl_r64.safetensors", arguments.folder / "sdxl_small.safetensors"
    if not source.exists():
        write(source)
    size = source.stat().st_size
    print(f"SDXL, {len(dict(layers()))} modules, rank {RANK} → {KEPT}, {size / 1e6:.0f} MB")
    print(f"{'':34} {'wall':>8} {'processor':>10} {'memory grown':>13} {'of file':>8} {'error':>9}")
    runs = {}
    same = {"rank": KEPT}
    for threads in arguments.threads:
        runs[threads] = found = run("ours", source, output, json.dumps(same), threads)
        _row(f"adapterkit, threads {threads}", found, size, found["measured"])
        for part, seconds in found["parts"].items():  # type: ignore[attr-defined]
            print(f"{'  ' + part:34} {seconds:7.2f}s")
        print(f"{'  the whole command':34} {command_line(source, output, threads):7.2f}s")
    shared = run("ours", source, output, json.dumps({"size": int(runs[threads]["size"])}), threads)
    _row("adapterkit, --size of that file", shared, size, shared["measured"])
    best = best_error(source)
    for threads in arguments.dense_threads:
        found = run("dense", threads)
        _row(f"dense SVDs, threads {threads}", found, size, best)
        for ours_threads, mine in runs.items():
            wall, used = (found[key] / mine[key] for key in ("seconds", "processor"))
            print(
                f"  adapterkit on {ours_threads}: {wall:.0f} times as fast, {used:.0f} times less processor"
            )
    output.unlink()


def _row(name: str, found: dict[str, float], size: int, error: float) -> None:
    memory = found["memory"]
    print(
        f"{name:34} {found['seconds']:7.2f}s {found['processor']:9.2f}s {memory / 1e6:10.0f} MB "
        f"{memory / size:8.2f} {error:9.6f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        way, *rest = sys.argv[2:]
        if way == "ours":
            ours(Path(rest[0]), Path(rest[1]), json.loads(rest[2]), int(rest[3]))
        else:
            dense(int(rest[0]))
    else:
        main()
