"""How long merging adapters into one of few ranks takes, and how much memory.

    python benchmarks/merging.py FOLDER [--threads 1 2] [--peft] [--largest 5120]

First four SDXL adapters of rank 64, on all linear and convolutional layers of the UNet, become one of rank
64 (`merge --method svd`). The files are written to FOLDER once: seeded random factors whose columns fall
as i^-0.6. Beside it the dense way, as sd-scripts' svd_merge_lora takes it: the sum of the products and
torch.linalg.svd in float32, timed once for each shape and counted as often as the shape occurs. It asks for
full matrices; on shapes with a side above --largest, where these take minutes, the thin SVD is timed in
their place, which is less.

Then three adapters of rank 16 on layers of 4096 × 4096 and 11008 × 4096 become one of rank 16: the same two
ways in memory, and with --peft also peft's own add_weighted_adapter("svd") on a model of these two layers.

Each way runs in a process of its own, which imports everything first; then only the work is timed, in
processor seconds, and the growth of its peak memory is read. Reading, decomposing, verifying and writing
are all part of adapterkit's time; none of them of the dense way's.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.errors import Json
from adapterkit.specs.families import family
from adapterkit.specs.layouts import layouts
from adapterkit.stores import TensorInfo, canonical_order, write_safetensors

COUNT, RANK = 4, 64
STRENGTHS = [0.8, 0.5, -0.3, 0.6]
LAYERS = {"q": (4096, 4096), "down": (11008, 4096)}
LLM_COUNT, LLM_RANK = 3, 16


def shapes() -> dict[str, tuple[int, ...]]:
    """The UNet's layers by kohya's names."""
    base = family("sdxl")[0]
    prefix, network = base.target("kohya").prefixes["unet"], base.network("unet")
    assert network is not None
    found = {}
    for row in network.namings[prefix.naming].rows:
        shape = network.weight_shape(row.span[0].module)
        if row.param is None and len(row.span) == 1 and shape is not None and len(shape) in (2, 4):
            found[prefix.text + row.native.replace(".", layouts()["kohya"].dot)] = shape
    return found


def write_files(folder: Path) -> list[Path]:
    """The four adapters, written unless they are there."""
    paths = [folder / f"sdxl_rank{RANK}_{index}.safetensors" for index in range(COUNT)]
    factors: dict[str, tuple[int, ...]] = {}
    for name, (rows, *rest) in shapes().items():
        factors[f"{name}.lora_up.weight"] = (rows, RANK, *(1 for _ in rest[1:]))
        factors[f"{name}.lora_down.weight"] = (RANK, *rest)
        factors[f"{name}.alpha"] = ()
    infos = canonical_order([TensorInfo(key, "F16" if s else "F32", s) for key, s in factors.items()])
    for seed, path in enumerate(paths):
        if not path.exists():
            write_safetensors(path, infos, _numbers(infos, seed), {"ss_network_module": "networks.lora"})
    return paths


def _numbers(infos: list[TensorInfo], seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    falling = torch.arange(1, RANK + 1).float() ** -0.6
    for info in infos:
        if not info.shape:
            yield info.name, torch.tensor(RANK / 2)
            continue
        values = torch.randn(info.shape, generator=generator).mul_(0.02)
        if info.shape[1] == RANK and "up" in info.name:
            values *= falling.reshape(1, -1, *(1 for _ in info.shape[2:]))
        yield info.name, values.half()


def ours(folder: Path) -> Callable[[], None]:
    from adapterkit import MergeOptions, merge
    from adapterkit.ranks import RankRule

    paths, output = write_files(folder), folder / "scratch.safetensors"

    def run() -> None:
        merge(paths, STRENGTHS, output, RankRule(rank=RANK), MergeOptions(method="svd", force=True))

    return run


def dense(shape: tuple[int, int], count: int, rank: int, full: bool) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator))
        for _ in range(count)
    ]

    def run() -> None:
        total = torch.stack([up @ down for up, down in pairs]).sum(dim=0)
        u, s, vt = torch.linalg.svd(total, full_matrices=full)
        del u, s, vt

    return run


def language_states() -> list[dict[str, Tensor]]:
    """Three adapters of two layers under PEFT's names."""
    states = []
    for seed in range(LLM_COUNT):
        generator, state = torch.Generator().manual_seed(seed), {}
        for name, (rows, columns) in LAYERS.items():
            front = f"base_model.model.{name}"
            state[f"{front}.lora_A.weight"] = torch.randn(LLM_RANK, columns, generator=generator)
            state[f"{front}.lora_B.weight"] = torch.randn(rows, LLM_RANK, generator=generator)
        states.append(state)
    return states


def ours_in_memory() -> Callable[[], None]:
    from adapterkit import MergeOptions, plan_merge
    from adapterkit.ranks import RankRule
    from adapterkit.stores import memory_store

    config: Json = {"peft_type": "LORA", "r": LLM_RANK, "lora_alpha": LLM_RANK, "target_modules": [*LAYERS]}
    stores = [memory_store(state, sidecars={"adapter_config.json": config}) for state in language_states()]
    options = MergeOptions(method="svd")

    def run() -> None:
        plan_merge(stores, [0.7, 0.5, -0.4], RankRule(rank=LLM_RANK), options).plan.state_dict()

    # Tables are read once in a process.
    run()
    return run


def peft_way() -> Callable[[], None]:
    import peft

    model = torch.nn.Module()
    for name, (rows, columns) in LAYERS.items():
        model.add_module(name, torch.nn.Linear(columns, rows, bias=False))
    config = peft.LoraConfig(r=LLM_RANK, lora_alpha=LLM_RANK, target_modules=list(LAYERS))
    names = [f"adapter_{index}" for index in range(LLM_COUNT)]
    wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return lambda: wrapped.add_weighted_adapter(
        names, [0.7, 0.5, 0.4], "merged", combination_type="svd", svd_rank=LLM_RANK
    )


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads[0])
    match arguments.work.split():
        case ["ours"]:
            run = ours(arguments.folder)
        case ["memory"]:
            run = ours_in_memory()
        case ["peft"]:
            run = peft_way()
        case [rows, columns, count, rank, full]:
            run = dense((int(rows), int(columns)), int(count), int(rank), full == "full")
        case _:
            raise ValueError(arguments.work)
    before, wall, spent = peak(), time.perf_counter(), time.process_time()
    run()
    found = {"cpu": time.process_time() - spent, "wall": time.perf_counter() - wall}
    print(json.dumps({**found, "memory": peak() - before}))


def measured(what: str, folder: Path, threads: int, runs: int = 1) -> dict[str, float]:
    """The run that took the least processor time."""
    command = [sys.executable, __file__, str(folder), "--work", what, "--threads", str(threads)]
    found = []
    for _ in range(runs):
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(result.stdout.splitlines()[-1]))
    return min(found, key=lambda one: one["cpu"])


def row(way: str, threads: int, found: dict[str, float], dense_cpu: float) -> None:
    memory = f"{found['memory'] / 1e6:8.0f} MB"
    ratio = f"{dense_cpu / found['cpu']:8.0f}x"
    print(f"{way:34} {threads:7} {found['cpu']:9.2f}s {found['wall']:9.2f}s {ratio} {memory}", flush=True)


def image(arguments: argparse.Namespace) -> None:
    """Four SDXL adapters."""
    write_files(arguments.folder)
    counts = Counter((shape[0], math.prod(shape[1:])) for shape in shapes().values())
    total: dict[str, float] = {"cpu": 0.0, "wall": 0.0, "memory": 0.0}
    thin = 0
    for (rows, columns), count in sorted(counts.items()):
        full = max(rows, columns) <= arguments.largest
        thin += 0 if full else count
        what = f"{rows} {columns} {COUNT} {RANK} {'full' if full else 'thin'}"
        found = measured(what, arguments.folder, 1)
        for key in ("cpu", "wall"):
            total[key] += count * found[key]
        total["memory"] = max(total["memory"], found["memory"])
    print(f"{COUNT} SDXL adapters of rank {RANK} to rank {RANK}: {sum(counts.values())} modules, ", end="")
    print(f"{len(counts)} shapes; full matrices but on {thin} modules")
    row("dense, by shape times count", 1, total, total["cpu"])
    for threads in arguments.threads:
        row("adapterkit, file to file", threads, measured("ours", arguments.folder, threads, 2), total["cpu"])
    (arguments.folder / "scratch.safetensors").unlink(missing_ok=True)


def language(arguments: argparse.Namespace) -> None:
    """Three adapters of two language model's layers."""
    full = {"cpu": 0.0, "wall": 0.0, "memory": 0.0}
    for rows, columns in LAYERS.values():
        found = measured(f"{rows} {columns} {LLM_COUNT} {LLM_RANK} full", arguments.folder, 1)
        full = {
            key: max(full[key], found[key]) if key == "memory" else full[key] + found[key] for key in full
        }
    sizes = " and ".join(f"{rows} x {columns}" for rows, columns in LAYERS.values())
    print(f"\n{LLM_COUNT} adapters of rank {LLM_RANK} to rank {LLM_RANK}: {sizes}")
    row("dense, full matrices", 1, full, full["cpu"])
    if arguments.peft:
        row("peft, add_weighted_adapter(svd)", 1, measured("peft", arguments.folder, 1), full["cpu"])
    for threads in arguments.threads:
        row("adapterkit, in memory", threads, measured("memory", arguments.folder, threads, 5), full["cpu"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--largest", type=int, default=5120)
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(f"{'way':34} {'threads':>7} {'cpu':>10} {'wall':>10} {'less cpu':>9} {'memory':>11}")
    image(arguments)
    language(arguments)


if __name__ == "__main__":
    main()
