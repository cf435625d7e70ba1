"""How long extracting an adapter from a whole Stable Diffusion 1.5-sized pair takes, and how much memory.

    python benchmarks/extracting.py FOLDER [--rank 64] [--threads 1 2] [--device cuda]

Two fp16 checkpoints with the names and shapes of the tables and seeded random weights are written to
FOLDER once: a base, and the base with a change of falling singular values in every matrix (σ_i ~ i^-½,
full rank). Then, each in a process of its own: reading both files from start to end; the decompositions
alone, of differences that lie in memory, one for each shape and counted as often as the shape occurs;
and `extract` itself, end to end. The goal is four times the reading plus the decompositions' floor; both
sides are counted in the processor's seconds, which a machine that others use leaves comparable.
Dense SVDs as sd-scripts makes them (torch.linalg.svd, full matrices, float32) are timed on the
smaller shapes, where that is bearable.
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

from adapterkit.specs.families import Family, family
from adapterkit.stores import TensorInfo, canonical_order, open_store, write_safetensors

NAMES = {"model.diffusion_model.": ("unet", "ldm"), "cond_stage_model.transformer.": ("text_encoder", "hf")}
# A dense SVD with full matrices of anything longer takes minutes.
LONGEST = 5120


def tensors(base: Family) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, by its key."""
    found = {}
    for text, (component, naming) in NAMES.items():
        network = base.network(component)
        assert network is not None
        for row in network.namings[naming].rows:
            for param in ("weight", "bias") if row.param is None else (row.param,):
                name = f"{row.span[0].module}.{param}"
                if name in network.shapes:
                    key = text + row.native + (f".{param}" if row.param is None else "")
                    found[key] = network.shapes[name]
    return found


def write_pair(folder: Path) -> tuple[Path, Path]:
    """(tuned, base), written unless they are there."""
    paths = folder / "sd15_tuned.safetensors", folder / "sd15_base.safetensors"
    infos = canonical_order(
        [TensorInfo(key, "F16", shape) for key, shape in tensors(family("sd1")[0]).items()]
    )
    for path in paths:
        if not path.exists():
            write_safetensors(path, infos, _numbers(infos, tuned=path is paths[0]), {"format": "pt"})
    return paths


def _numbers(infos: list[TensorInfo], *, tuned: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for index, info in enumerate(infos):
        generator = torch.Generator().manual_seed(index)
        weight = torch.randn(info.shape, generator=generator) * 0.02
        if tuned and len(info.shape) > 1:
            weight += _change(info.shape, generator)
        yield info.name, weight.half()


def _change(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A change of a twentieth of the weight's size, by random factors of falling columns."""
    o, n = shape[0], math.prod(shape[1:])
    rank = min(o, n, 256)
    falling = torch.arange(1, rank + 1).rsqrt()
    up, down = torch.randn(o, rank, generator=generator) * falling, torch.randn(rank, n, generator=generator)
    change = up @ down + torch.randn(o, n, generator=generator) * 0.3
    return (change * (0.001 / change.square().mean().sqrt())).reshape(shape)


def read(paths: list[Path]) -> None:
    buffer = bytearray(1 << 24)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def shapes(path: Path) -> Counter[tuple[int, int]]:
    """How often each matrix occurs that is extracted."""
    with open_store(path) as store:
        found = [info.shape for info in store.tensors.values() if len(info.shape) > 1]
    return Counter((shape[0], math.prod(shape[1:])) for shape in found if shape[0] != 49408)


def floor(path: Path, rank: int, device: str | None) -> dict[str, float]:
    """The decompositions alone, in seconds of the processor: ours, and dense ones where they are bearable."""
    from adapterkit.linalg.dense_svd import dense_svd

    torch.set_num_threads(1)
    ours = dense = ours_beside = 0.0
    for shape, count in shapes(path).items():
        delta = _change(shape, torch.Generator().manual_seed(0)).to(device or "cpu")
        began = time.process_time()
        dense_svd(delta, rank).vectors(rank)
        spent = (time.process_time() - began) * count
        ours += spent
        if max(shape) <= LONGEST and count > 1:
            began = time.process_time()
            torch.linalg.svd(delta)
            dense += (time.process_time() - began) * count
            ours_beside += spent
    return {"seconds": ours, "dense": dense, "beside": ours_beside}


def run(tuned: Path, base: Path, rank: int, threads: int, device: str | None) -> dict[str, float]:
    from adapterkit.operations.extract import ExtractOptions, extract
    from adapterkit.ranks import RankRule

    torch.set_num_threads(threads)
    output = tuned.with_name("extracted.safetensors")
    began, spent = time.perf_counter(), time.process_time()
    done = extract(tuned, base, output, RankRule(rank=rank), ExtractOptions(force=True, device=device))
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - spent,
        "error": math.sqrt(1 - done.kept),
        "size": output.stat().st_size,
    }


def work(what: str, arguments: argparse.Namespace, threads: int) -> dict[str, float]:
    tuned, base = write_pair(arguments.folder)
    began = time.perf_counter()
    found: dict[str, float] = {}
    if what == "read":
        read([tuned, base])
        found = {"seconds": time.perf_counter() - began}
    elif what == "floor":
        found = floor(tuned, arguments.rank, arguments.device)
    else:
        found = run(tuned, base, arguments.rank, threads, arguments.device)
    return {**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measured(what: str, threads: int = 1) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--work", what, "--of", str(threads)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work, arguments, arguments.of)))
        return
    write_pair(arguments.folder)
    measured("read")
    reading, decomposing = measured("read")["seconds"], measured("floor")
    print(
        f"reading both files, {2 * (arguments.folder / 'sd15_base.safetensors').stat().st_size / 1e9:.2f} GB:"
    )
    print(f"    {reading:.2f} s")
    print(f"decompositions alone, rank {arguments.rank}: {decomposing['seconds']:.1f} s of the processor")
    ratio = decomposing["dense"] / decomposing["beside"]
    print(f"    dense SVDs of matrices up to {LONGEST}: {decomposing['dense']:.0f} s, {ratio:.0f} times ours")
    lowest = 4 * reading + decomposing["seconds"]
    for threads in arguments.threads:
        done = measured("extract", threads)
        print(
            f"extract, {threads} threads: {done['seconds']:.1f} s; {done['cpu']:.1f} s of the processor, "
            f"{done['cpu'] / lowest:.2f} of 4 x reading + floor; peak {done['peak'] / 1e6:.0f} MB; "
            f"error {done['error']:.4f}, {done['size'] / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
