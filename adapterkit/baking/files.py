"""The files of a base model, and those that a model made from it has: the same, in the same places."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from adapterkit.errors import Json
from adapterkit.stores import Store
from adapterkit.stores.base import DEFAULT_LIMITS
from adapterkit.stores.files import PICKLE_SUFFIXES
from adapterkit.stores.guards import is_file, is_folder
from adapterkit.stores.json_files import read_json
from adapterkit.stores.model_folder import CONFIG
from adapterkit.stores.sharded import INDEX_SUFFIX, weight_map_of

SAFETENSORS = ".safetensors"
# The configuration's count of tokens.
TOKENS = "vocab_size"
# Weights in forms that we do not write; beside what is baked they would be those of the base.
_OTHER_WEIGHTS = (SAFETENSORS, *PICKLE_SUFFIXES, ".gguf", ".onnx", ".msgpack", ".h5", ".onnx_data", ".ot")
# What transformers v5.24 saves of tokenizers: tokenization_utils_base.py, and the models' vocabularies.
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
_PICKLED, _PLAIN = "pytorch_model", "model"


@dataclass(frozen=True)
class OutFile:
    """A tensor file of the output.

    name: its path from the output folder, with slashes; "" where the output is a file.
    source: the base's file.  front: what stands before its tensors' names in the base's keys.
    keys: the tensors that it has, in the base's keys.
    """

    name: str
    source: Path | None
    front: str
    keys: tuple[str, ...]
    metadata: Mapping[str, str]

    def plain(self, key: str) -> str:
        """A tensor's name in the file itself."""
        return key.removeprefix(self.front)


@dataclass(frozen=True)
class BaseLayout:
    """The files of a base.

    root: the folder they are in, None if the base is one file, or in memory.
    indexes: by the path of an index in the output: the base's, and what stands before its keys.
    copies: files that are taken over as they are, by their paths in the output.  left: weights in other
    forms, that would not be those of the output.  added: an adapter's, some of them in the place of copies.
    """

    root: Path | None
    files: tuple[OutFile, ...]
    indexes: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    added: Mapping[str, Path] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Every file of the output folder."""
        return (*(file.name for file in self.files), *self.indexes, *self.copies, *self.added)

    def file_of(self, key: str) -> OutFile:
        """The file that a tensor, or one that belongs to it, lies in."""
        for file in self.files:
            if key in file.keys:
                return file
        stem = key.rpartition(".")[0] + "."
        return next(file for file in self.files if any(known.startswith(stem) for known in file.keys))


def layout_of(store: Store) -> BaseLayout:
    """The files behind a base model's store."""
    root = _root(store)
    files = tuple(
        OutFile(
            _renamed(file.path, root),
            file.path,
            front,
            tuple(front + name for name in file.tensors),
            file.metadata,
        )
        for front, file in store.files()
    )
    if root is None:
        return BaseLayout(None, files)
    files = tuple(sorted(files, key=lambda file: file.name))
    folders = {str(PurePosixPath(file.name).parent): file.front for file in files}
    indexes = dict(_indexes(root, store, folders))
    taken = {*(file.source for file in files), *(path for path, _ in indexes.values())}
    copies, left = _others(root, set(folders), taken)
    return BaseLayout(root, files, indexes, copies, left)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """What says how text becomes numbers in a folder, by name."""
    return {name: folder / name for name in _TOKENIZERS if is_file(folder / name)}


def index_json(layout: BaseLayout, name: str, sizes: Mapping[str, int]) -> Json:
    """An index for the output. sizes: bytes of every tensor of the output, by its key."""
    path, front = layout.indexes[name]
    document = read_json(path, DEFAULT_LIMITS.header_bytes)
    assert isinstance(document, dict)
    folder = PurePosixPath(name).parent
    mine = [file for file in layout.files if PurePosixPath(file.name).parent == folder]
    keys = [(file, key) for file in mine for key in file.keys if key in sizes]
    metadata = document.get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    total = sum(sizes[key] for _, key in keys)
    weights: dict[str, Json] = {
        key.removeprefix(front): PurePosixPath(file.name).name
        for file, key in sorted(keys, key=lambda pair: pair[1])
    }
    return {**document, "metadata": {**kept, "total_size": total}, "weight_map": weights}


def edited_json(path: Path, edits: Mapping[str, Json]) -> bytes:
    """A configuration with some fields changed, in the part of it that has them."""
    document = read_json(path, DEFAULT_LIMITS.json_bytes)
    assert isinstance(document, dict)
    for name, value in edits.items():
        part = document
        for inner in document.values():
            if name not in document and isinstance(inner, dict) and name in inner:
                part = inner
        part[name] = value
    return (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode("utf-8")


def config_path(front: str) -> str:
    """Where the configuration stands that speaks of the keys behind `front`."""
    return front + CONFIG


def _root(store: Store) -> Path | None:
    if store.path is None:
        return None
    if is_folder(store.path):
        return store.path
    return store.path.parent if store.path.name.endswith(INDEX_SUFFIX) else None


def _renamed(path: Path | None, root: Path | None) -> str:
    """A file's place in the output: its own, but that a pickle becomes safetensors."""
    if root is None or path is None:
        return ""
    relative = path.relative_to(root)
    if relative.suffix.lower() in PICKLE_SUFFIXES:
        stem = relative.stem
        if stem.startswith(_PICKLED):
            stem = _PLAIN + stem.removeprefix(_PICKLED)
        relative = relative.with_name(stem + SAFETENSORS)
    return relative.as_posix()


def _indexes(root: Path, store: Store, folders: Mapping[str, str]) -> Iterator[tuple[str, tuple[Path, str]]]:
    """The indexes that name the files of the base."""
    sources = {file.path for _, file in store.files()}
    for folder, front in folders.items():
        for path in sorted((root / folder).glob(f"*{INDEX_SUFFIX}")):
            shards = weight_map_of(read_json(path, DEFAULT_LIMITS.header_bytes)) or {}
            if {path.parent / name for name in shards.values()} & sources:
                name = path.relative_to(root).as_posix()
                for suffix in PICKLE_SUFFIXES:
                    if name.endswith(suffix + INDEX_SUFFIX):
                        name = _renamed(Path(str(path).removesuffix(INDEX_SUFFIX)), root) + INDEX_SUFFIX
                yield name, (path, front)


def _others(
    root: Path, folders: set[str], taken: Iterable[Path | None]
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """What else lies in the folder: files to copy, and weights that are left behind.

    Folders of a pipeline's other parts (a VAE) are copied whole. What lies beside baked weights, or
    below them, is copied unless it is weights in another form.
    """
    pipeline = "." not in folders
    copies: dict[str, Path] = {}
    left: list[str] = []
    known = set(taken)
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not is_file(path) or path in known:
            continue
        top = relative.parts[0] if len(relative.parts) > 1 else "."
        beside = not pipeline or top in folders or top == "."
        is_weights = path.name.lower().endswith((*_OTHER_WEIGHTS, INDEX_SUFFIX))
        if beside and is_weights:
            left.append(relative.as_posix())
        else:
            copies[relative.as_posix()] = path
    return copies, tuple(left)
