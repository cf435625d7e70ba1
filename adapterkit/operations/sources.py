"""What an operation may be given: a path, an open store, or a state dict in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Union

from adapterkit.detect import Explanation, explain
from adapterkit.errors import UsageError
from adapterkit.scale import ScaleFrom
from adapterkit.specs.families import families
from adapterkit.specs.tuner_config import CONFIG_FILE
from adapterkit.stores import Store, memory_store, open_store
from adapterkit.stores.joined import JoinedStore

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.adapter import Adapter

Source = Union[str, Path, Store, "Mapping[str, Tensor]", "Opened"]


class Opened:
    """A file that was opened and explained; its tensors are read when `load` is called, or later.

    store: its tensors, by name.  explanation: family, layouts, and where each tensor belongs.
    Use it as a context manager, or call `close`; tensors already handed out stay valid.
    """

    def __init__(self, store: Store, explanation: Explanation) -> None:
        self.store = store
        self.explanation = explanation

    def load(self, *, allow: Collection[str] = (), scale_from: ScaleFrom | None = None) -> Adapter:
        """The adapter in it; see `adapterkit.load`."""
        from adapterkit.adapter import read_adapter

        return read_adapter(self.store, self.explanation, allow=allow, scale_from=scale_from)

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def store_of(source: Source) -> Store:
    """The store behind a source; a path is opened by its content, a state dict is wrapped.

    A folder whose sub-folders are PEFT adapters named by a model's components (`unet`,
    `text_encoder`) is opened as one.
    """
    if isinstance(source, Opened):
        return source.store
    if isinstance(source, Store):
        return source
    if source == "":
        # As a path it would be the folder one happens to be in.
        raise UsageError("the path of the input is empty", hint="name a file or a folder")
    if isinstance(source, str | Path):
        parts = _component_folders(Path(source))
        return _joined(Path(source), parts) if parts else open_store(source)
    return memory_store(source)


def _component_folders(path: Path) -> list[Path]:
    if not path.is_dir() or (path / CONFIG_FILE).exists():
        return []
    names = sorted({name for family in families() for name in family.components if not family.open})
    return [path / name for name in names if (path / name / CONFIG_FILE).is_file()]


def _joined(path: Path, folders: list[Path]) -> Store:
    with ExitStack() as opened:
        parts = {folder.name: opened.enter_context(open_store(folder)) for folder in folders}
        opened.pop_all()
    return JoinedStore(path, parts)


def open(source: Source, *, family: str | None = None) -> Opened:
    """Open and explain an adapter of any known format from its header.

    source: a path (file, PEFT folder, sharded index), a store, or a state dict in memory.
    family: the base model, where the file alone does not tell.
    Raises StoreError, UnsafeFile or Unrecognized.
    """
    store = store_of(source)
    if isinstance(source, Opened) and family is None:
        return source
    try:
        return Opened(store, explain(store, family_name=family))
    except BaseException:
        if store is not source:
            store.close()
        raise


def load(
    source: Source,
    *,
    family: str | None = None,
    allow: Collection[str] = (),
    scale_from: ScaleFrom | None = None,
) -> Adapter:
    """Read an adapter of any known format; its tensors view the file until they are used.

    source, family: see `open`.
    allow: consents to leave tensors out ("unclaimed", "incomplete").
    scale_from: "alpha" or "config", which holds when both are there and differ.
    Raises Unrecognized, Refused, Conflict, Mismatch or StoreError.
    """
    return open(source, family=family).load(allow=allow, scale_from=scale_from)
