"""Writing what was baked: one file, or the folder of a model, all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from adapterkit.baking.arithmetic import Manner
from adapterkit.baking.files import OutFile, config_path, edited_json, index_json
from adapterkit.baking.plan import BakePlan, together
from adapterkit.baking.stream import Stream, Undoing
from adapterkit.baking.survival import Kept, Survival
from adapterkit.baking.undo import UndoWriter
from adapterkit.derived import PROVENANCE, history
from adapterkit.errors import Json, Refused, UsageError
from adapterkit.linalg.devices import device_of
from adapterkit.metadata import drop_hashes, renew_hashes
from adapterkit.operations.bake_inputs import Job
from adapterkit.stores import TensorInfo, Written, open_store, write_safetensors
from adapterkit.stores.atomic import replacing
from adapterkit.stores.guards import beside
from adapterkit.stores.partial import Partial, partial_folder

if TYPE_CHECKING:
    from torch import Tensor

# Less of the changes than this is no bake any more.
LEAST_KEPT = 0.5
UNDO_SUFFIX = ".undo"


@dataclass(frozen=True, eq=False)
class Baking:
    """The outcome of `bake`.

    plan: what was done to which tensor.  kept: what rounding left of each tensor's change, by its key.
    would_keep: the dtype that leaves enough of them, if the written one does not.
    files, written: the tensor files.  undo: the file that takes it back.  resumed: files that were there.
    tensors: all of the output's, if none was written.
    """

    plan: BakePlan
    kept: Mapping[str, Kept]
    would_keep: str = ""
    files: tuple[Path, ...] = ()
    written: tuple[Written, ...] = ()
    undo: Path | None = None
    resumed: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> Kept:
        """What is left of all changes, as one."""
        return together(self.kept.values())


def in_memory(job: Job) -> Baking:
    """The tensors of the output; those that are as they were are the base's own."""
    survival, told = Survival(), _Told(job)
    stream = Stream(job.plan, _manner(job), survival, None, told, told.fallbacks)
    with closing(stream.contents([*job.plan.tensors])) as contents:
        made = {key: content for key, content in contents if not isinstance(content, bytes | memoryview)}
    store = job.plan.base.store
    tensors = {key: made[key] if key in made else store.tensor(key) for key in job.plan.header}
    advice = _judged(job, survival.modules, survival.would_keep(LEAST_KEPT))
    return Baking(job.plan, survival.modules, advice, tensors=tensors, notes=told.notes)


def write_file(job: Job, output: Path) -> Baking:
    """Write the one file of a base that is one."""
    survival, told = Survival(), _Told(job)
    overwrite = job.options.force or job.options.in_place
    (file,) = job.files
    name = file.source.name if file.source is not None else output.name
    with ExitStack() as stack:
        undoing = _undoing(job, output, stack)
        if undoing is not None and file.source is not None:
            undoing.begin(name, file.source)
        advice: list[str] = []

        def check(temporary: Path) -> None:
            advice.append(_judged(job, survival.modules, survival.would_keep(LEAST_KEPT)))
            if undoing is not None:
                undoing.finish({name: temporary})

        written = _write(job, replace(file, name=name), output, survival, undoing, told, overwrite, check)
    return Baking(
        job.plan,
        survival.modules,
        advice[0],
        (output,),
        (written,),
        _undo_path(output) if undoing is not None else None,
        notes=told.notes,
    )


def write_folder(job: Job, output: Path) -> Baking:
    """Write a model's folder; files that are finished stay for a run that resumes."""
    files, told = job.files, _Told(job)
    names = [*dict.fromkeys(job.layout.names)]
    overwrite = job.options.force or job.options.in_place
    with ExitStack() as stack:
        partial = stack.enter_context(
            partial_folder(output, names, _request(job), overwrite=overwrite, resume=job.options.resume)
        )
        undoing = _undoing(job, output, stack)
        resumed = tuple(partial.finished)
        for file in files:
            if undoing is not None and file.source is not None:
                undoing.begin(file.name, file.source)
            if file.name in partial.finished:
                if undoing is not None:
                    _note_again(job, file, partial.path / file.name, undoing)
                told(sum(job.plan.header[key].nbytes for key in file.keys))
                continue
            (partial.path / file.name).parent.mkdir(parents=True, exist_ok=True)
            survival = Survival()
            written = _write(job, file, partial.path / file.name, survival, undoing, told, True, None)
            partial.finish(file.name, _noted(written, survival))
        kept, advice = _read_back(partial)
        advice = _judged(job, kept, advice)
        _side_files(job, files, partial.path, undoing)
        if undoing is not None:
            tensors = {file.name: partial.path / file.name for file in files}
            undoing.finish(tensors | _edited(job, partial.path))
        done = tuple(_written(partial.finished[file.name]) for file in files)
    return Baking(
        job.plan,
        kept,
        advice,
        tuple(output / file.name for file in files),
        done,
        _undo_path(output) if undoing is not None else None,
        resumed,
        notes=told.notes,
    )


def _note_again(job: Job, file: OutFile, path: Path, undoing: UndoWriter) -> None:
    """The bits of a file that an earlier run finished, whose undo file was not."""
    base = job.plan.base.store
    with open_store(path) as store:
        for key in file.keys:
            if key in job.plan.tensors and key in base.tensors:
                name = file.plain(key)
                Undoing(undoing, file.name, file.plain).note(key, base.read(key), store.read(name))


class _Told:
    """What is told while files are written: bytes of all of them together, and tensors that fell back."""

    def __init__(self, job: Job) -> None:
        self.fallbacks: list[str] = []
        self._job = job
        self._progress = job.progress
        self._done = 0
        self._total = job.plan.size

    def __call__(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress("baking", self._done, self._total)

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the job, and where it was computed if not where it was asked for."""
        found = (*self._job.notes, *_device(self._job)[1])
        if self.fallbacks:
            found += (f"{len(self.fallbacks)} tensors did not fit on the device: computed on the processor",)
        return found


def _manner(job: Job) -> Manner:
    return Manner(job.options.rounding, job.options.seed, _device(job)[0])


def _device(job: Job) -> tuple[torch.device, tuple[str, ...]]:
    """Where to compute, and a note if that is not where it was asked for."""
    try:
        return device_of(job.options.device), ()
    except UsageError as error:
        return torch.device("cpu"), (f"{error.message}: computed on the processor",)


def _write(
    job: Job,
    file: OutFile,
    path: Path,
    survival: Survival,
    undoing: UndoWriter | None,
    told: _Told,
    overwrite: bool,
    check: Callable[[Path], None] | None,
) -> Written:
    header = job.plan.header
    infos = [TensorInfo(file.plain(key), header[key].dtype, header[key].shape) for key in file.keys]
    noting = Undoing(undoing, file.name, file.plain) if undoing is not None else None
    stream = Stream(job.plan, _manner(job), survival, noting, told, told.fallbacks)
    with closing(stream.contents(file.keys)) as contents:
        named = ((file.plain(key), content) for key, content in contents)
        return write_safetensors(
            path,
            infos,
            named,
            _metadata(job, file),
            overwrite=overwrite,
            check=check,
            hashed=job.options.hashes,
        )


def _metadata(job: Job, file: OutFile) -> dict[str, str]:
    """The base's, with what was baked into it."""
    metadata = {"format": "pt", **file.metadata}
    metadata[PROVENANCE] = history(file.metadata, "bake", job.facts)
    (renew_hashes if job.options.hashes else drop_hashes)(metadata)
    return metadata


def _judged(job: Job, kept: Mapping[str, Kept], would_keep: str) -> str:
    """The dtype that would keep enough, where the written one does not. Refused without consent."""
    total = together(kept.values())
    if total.ratio >= LEAST_KEPT and not total.beyond:
        return ""
    if "precision" in job.options.allow or "nonfinite" in job.options.allow:
        return would_keep
    worst = min(kept, key=lambda key: kept[key].ratio)
    what = (
        f"{total.beyond} numbers are too large for the dtype"
        if total.beyond
        else f"rounding leaves {total.ratio:.0%} of the changes, of `{worst}` {kept[worst].ratio:.0%}"
    )
    raise Refused(
        what,
        code="precision",
        hint=f"--dtype {would_keep} keeps them, --round stochastic keeps their mean; "
        "--allow precision bakes all the same",
        details={"kept": total.ratio, "worst": worst, "dtype": would_keep, "beyond": total.beyond},
    )


def _undo_path(output: Path) -> Path:
    return beside(output, UNDO_SUFFIX)


def _undoing(job: Job, output: Path, stack: ExitStack) -> UndoWriter | None:
    if not job.options.keep_undo:
        return None
    return stack.enter_context(UndoWriter(_undo_path(output), overwrite=job.options.force))


def _request(job: Job) -> str:
    """What tells one bake from another: the base's files as they are, the adapters, the options."""
    stamps = []
    for file in job.layout.files:
        if file.source is not None:
            status = file.source.stat()
            stamps.append([file.name, status.st_size, status.st_mtime_ns])
    options = {**asdict(job.options), "allow": sorted(job.options.allow)}
    for name in ("resume", "force", "in_place"):
        options.pop(name)
    text = json.dumps([stamps, dict(job.facts), options], sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


def _noted(written: Written, survival: Survival) -> dict[str, Json]:
    kept: dict[str, Json] = {key: list(asdict(one).values()) for key, one in survival.modules.items()}
    return {
        "sha256": written.sha256,
        "size": written.size,
        "kept": kept,
        "would_keep": survival.would_keep(LEAST_KEPT),
    }


def _written(facts: Mapping[str, Json]) -> Written:
    size = facts["size"]
    assert isinstance(size, int)
    return Written(str(facts["sha256"]), None, size)


def _read_back(partial: Partial) -> tuple[dict[str, Kept], str]:
    """What is left of each tensor's change, in all files, and the widest dtype that one of them needs."""
    kept: dict[str, Kept] = {}
    needed = {str(facts["would_keep"]) for facts in partial.finished.values()}
    for facts in partial.finished.values():
        found = facts["kept"]
        assert isinstance(found, dict)
        kept |= {key: Kept(*cast(list[Any], values)) for key, values in found.items()}
    return kept, next((name for name in ("fp32", "fp16", "bf16") if name in needed), "")


def _edited(job: Job, folder: Path) -> dict[str, Path]:
    """Files beside the tensors that say something else than the base's, where they lie."""
    names = [*job.layout.indexes, *job.layout.added, *(config_path(front) for front in job.plan.edits)]
    return {name: folder / name for name in names if (folder / name).is_file()}


def _side_files(job: Job, files: tuple[OutFile, ...], folder: Path, undoing: UndoWriter | None) -> None:
    """Indexes and configurations made true, everything else as it is."""
    layout = replace(job.layout, files=files)
    edits = {config_path(front): fields for front, fields in job.plan.edits.items()}
    for name, source in layout.copies.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name in edits:
            _replaced(place, edited_json(source, edits[name]))
            if undoing is not None:
                undoing.keep(name, source.read_bytes())
        else:
            shutil.copyfile(source, place)
    for name, source in layout.added.items():
        shutil.copyfile(source, folder / name)
        if undoing is not None:
            undoing.keep(name, layout.copies[name].read_bytes() if name in layout.copies else None)
    sizes = {key: info.nbytes for key, info in job.plan.header.items()}
    for name, (source, _) in layout.indexes.items():
        document = index_json(layout, name, sizes)
        _replaced(folder / name, (json.dumps(document, indent=2) + "\n").encode("utf-8"))
        if undoing is not None:
            undoing.keep(name, source.read_bytes())


def _replaced(path: Path, raw: bytes) -> None:
    with replacing(path, len(raw), overwrite=True) as file:
        file.write(raw)
