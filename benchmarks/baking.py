"""How long baking a rank-64 adapter into a full-size SDXL takes: adapterkit, `cp`, and loading it all.

    python benchmarks/baking.py FOLDER [--runs 3] [--all]

FOLDER gets a base of 6.8 GB in fp16 and an adapter over all its linear layers and convolutions, both of
seeded noise. Each way runs in a process of its own, which imports everything first. `cp, synced` also waits
for the disk, as adapterkit does. `load all` is what merging scripts do (kohya-ss/sd-scripts,
networks/sdxl_merge_lora.py): read the whole model, add each product in float32, write the whole model; it
is run with --all only, as it takes more than 8 GB. Peak memory counts pages of mapped files; `own` does not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from adapterkit.specs.families import family
from adapterkit.specs.names import Row
from adapterkit.stores import TensorInfo, canonical_order, write_safetensors

RANK, ALPHA = 64, 32.0
SDXL = family("sdxl")[0]
# The prefixes of Stability's files; the component's naming is what the family's table says of each.
SINGLE = ("model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
_POOL = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))


def noise(shape: tuple[int, ...], scale: float, dtype: torch.dtype, at: int) -> torch.Tensor:
    """Numbers of a pool from a place that depends on the tensor: making new ones would take minutes."""
    count = torch.Size(shape).numel()
    start = at * 7919 % (1 << 20)
    times = (start + count) // len(_POOL) + 1
    return (_POOL.repeat(times)[start : start + count] * scale).to(dtype).reshape(shape)


def tensors_of(component: str, naming: str) -> Iterator[tuple[str, Row, tuple[int, ...]]]:
    network = SDXL.network(component)
    assert network is not None
    for row in network.namings[naming].rows:
        shape = network.stacked_shape(row.span)
        assert shape is not None
        if row.param is not None:
            yield row.native, row, shape[:1] if row.param == "bias" else shape
            continue
        yield f"{row.native}.weight", row, shape
        if f"{row.span[0].module}.bias" in network.shapes:
            yield f"{row.native}.bias", row, shape[:1]


def write_base(path: Path) -> None:
    prefixes = {prefix.text: prefix for prefix in SDXL.checkpoint if prefix.text in SINGLE}
    infos = canonical_order(
        [
            TensorInfo(text + name, "F16", shape[::-1] if row.span[0].transposed else shape)
            for text, prefix in reversed(prefixes.items())
            for name, row, shape in tensors_of(prefix.component, prefix.naming)
        ]
    )
    made = ((info.name, noise(info.shape, 0.02, torch.float16, at)) for at, info in enumerate(infos))
    write_safetensors(path, infos, made, {"format": "pt"}, overwrite=True)


def write_adapter(path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for component, prefix in SDXL.target("kohya").prefixes.items():
        for name, _, shape in tensors_of(component, prefix.naming):
            if len(shape) < 2 or "embed" in name.rpartition(".")[0].rpartition(".")[2]:
                continue
            stem = prefix.text + name.removesuffix(".weight").replace(".", "_")
            shapes[f"{stem}.lora_down.weight"] = (RANK, *shape[1:])
            shapes[f"{stem}.lora_up.weight"] = (shape[0], RANK, *[1] * (len(shape) - 2))
            shapes[f"{stem}.alpha"] = ()
    infos = canonical_order([TensorInfo(n, "F16" if s else "F32", s) for n, s in shapes.items()])
    made = (
        (i.name, noise(i.shape, 0.02, torch.float16, at) if i.shape else torch.tensor(ALPHA))
        for at, i in enumerate(infos)
    )
    write_safetensors(path, infos, made, {"ss_network_module": "networks.lora"}, overwrite=True)


def ours(hashes: bool) -> Callable[[Path, Path, Path], None]:
    from adapterkit.operations import bake_files  # noqa: F401 (imported before the clock starts)
    from adapterkit.operations.bake import BakeOptions, bake

    def run(base: Path, adapter: Path, output: Path) -> None:
        bake(base, [adapter], output, BakeOptions(force=True, hashes=hashes))

    return run


def copy(synced: bool) -> Callable[[Path, Path, Path], None]:
    def run(base: Path, adapter: Path, output: Path) -> None:
        shutil.copyfile(base, output)
        if synced:
            with output.open("rb+") as file:
                os.fsync(file.fileno())

    return run


def load_all() -> Callable[[Path, Path, Path], None]:
    from safetensors.torch import load_file, save_file

    from adapterkit.checkpoint import open_checkpoint
    from adapterkit.operations.sources import load

    def run(base: Path, adapter: Path, output: Path) -> None:
        state = load_file(base)
        state = {name: tensor.clone() for name, tensor in state.items()}
        with open_checkpoint(base) as checkpoint:
            for place, changes in load(adapter).changes.items():
                stretches = checkpoint.stretches(place.component, place.span, place.param) or ()
                delta, first = changes[0].dense(), 0
                for one in stretches:
                    rows = delta[first : first + one.stop - one.start]
                    weight = state[one.key].T if one.transposed else state[one.key]
                    part = weight[one.start : one.stop]
                    part.copy_((part.float() + rows.reshape(part.shape)).half())
                    first += one.stop - one.start
        save_file(state, output, metadata={"format": "pt"})

    return run


WAYS: dict[str, Callable[[], Callable[[Path, Path, Path], None]]] = {
    "adapterkit": lambda: ours(True),
    "no hash": lambda: ours(False),
    "cp": lambda: copy(False),
    "cp, synced": lambda: copy(True),
    "load all": load_all,
}


class Own(threading.Thread):
    """Watches the memory that is the process's own, without pages of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            text = Path("/proc/self/status").read_text()
            own = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, own * 1024)
            time.sleep(0.02)


def work(way: str, folder: Path) -> None:
    run, own = WAYS[way](), Own()
    own.start()
    began, cpu = time.perf_counter(), time.process_time()
    run(folder / "sdxl.safetensors", folder / "adapter.safetensors", folder / "out.safetensors")
    facts = {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "own": own.peak,
    }
    print(json.dumps(facts))


def measured(way: str, folder: Path) -> dict[str, float]:
    (folder / "out.safetensors").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--work", way, str(folder)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("sdxl.safetensors", write_base), ("adapter.safetensors", write_adapter)):
        if not (folder / name).exists():
            write(folder / name)
    ways = [way for way in WAYS if arguments.all or way != "load all"]
    rounds = [{way: measured(way, folder) for way in ways} for _ in range(arguments.runs)]
    size = (folder / "sdxl.safetensors").stat().st_size
    print(f"SDXL in fp16 ({size / 1e9:.2f} GB), rank {RANK} over all linear layers and convolutions")
    print(f"{'way':12} {'seconds':>9} {'of cp':>7} {'of synced':>10} {'CPU':>7} {'peak':>9} {'own':>9}")
    for way in ways:
        of = {
            name: median(r[way]["seconds"] / r[name]["seconds"] for r in rounds)
            for name in ("cp", "cp, synced")
        }
        one = {name: median(r[way][name] for r in rounds) for name in ("seconds", "cpu", "peak", "own")}
        print(
            f"{way:12} {one['seconds']:8.2f}s {of['cp']:7.2f} {of['cp, synced']:10.2f} {one['cpu']:6.1f}s "
            f"{one['peak'] / 1e6:6.0f} MB {one['own'] / 1e6:6.0f} MB"
        )
    (folder / "out.safetensors").unlink()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
