"""From the value a pickle holds to names and tensors.

Trainers wrap a state dict in all sorts of ways; the words typed here are theirs for the container,
not names of tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from adapterkit.errors import Json, StoreError
from adapterkit.stores.base import Limits
from adapterkit.stores.guards import require_name, shown
from adapterkit.stores.pickle_world import Named, TensorRef

# Under these keys a checkpoint keeps its tensors, beside an optimizer, counters and settings.
_WRAPPERS = (
    "state_dict", "model_state_dict", "lora_state_dict", "lora", "model", "module", "network", "weights",
)  # fmt: skip
_DEEPEST = 32


@dataclass
class Unpacked:
    """Tensors by dotted name, everything else as text, and what was left out."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def unpack(value: object, where: str, file_name: str, limits: Limits) -> Unpacked:
    """Name every tensor in a value. StoreError when it has none to name, or they cannot be told apart.

    A dict is read through its wrappers; nested dicts and lists give dotted names. A bare list is what
    lora_diffusion writes (cloneofsimo/lora, `save_lora_weight`): up and down in turn, module by module,
    of the text encoder if the file is called so and of the UNet if not; it is named as the same
    program names the tensors of its safetensors files.
    """
    walk = _Walk(where, limits)
    if isinstance(value, list):
        walk.pairs(value, "text_encoder" if "text_encoder" in file_name else "unet")
    elif isinstance(value, dict):
        walk.unwrap(value)
    else:
        raise StoreError(f"{where}: holds one {_kind(value)}, not named tensors", code="no-names")
    return walk.result


class _Walk:
    def __init__(self, where: str, limits: Limits) -> None:
        self.where = where
        self.limits = limits
        self.visited = 0
        self.result = Unpacked()
        self.holders: dict[int, bool] = {}

    def unwrap(self, value: dict[object, object]) -> None:
        for _ in range(_DEEPEST):
            inner = self._wrapped(value)
            if inner is None:
                break
            self._set_aside({key: other for key, other in value.items() if key != inner}, str(inner))
            within = value[inner]
            assert isinstance(within, dict)
            value = within
        for key, item in value.items():
            self._visit(item, _key(key), 0)

    def pairs(self, items: list[object], component: str) -> None:
        if len(items) % 2 or not all(isinstance(item, TensorRef) for item in items):
            raise StoreError(f"{self.where}: a list that is not ups and downs in turn", code="no-names")
        for position, item in enumerate(items):
            role = "down" if position % 2 else "up"
            self._visit(item, f"{component}:{position // 2}:{role}", 0)

    def _wrapped(self, value: dict[object, object]) -> str | None:
        """The key under which the tensors are, if there is just one and none lie beside it."""
        if any(isinstance(item, TensorRef) for item in value.values()):
            return None
        found = [key for key in _WRAPPERS if isinstance(value.get(key), dict) and self._holds(value[key])]
        return found[0] if len(found) == 1 else None

    def _set_aside(self, others: dict[object, object], kept: str) -> None:
        for key, item in others.items():
            if self._holds(item):
                other = shown(_key(key))
                self.result.warnings.append(f"tensors under `{other}`, beside `{kept}`, are not read")
            else:
                self._note(item, _key(key), 0)

    def _visit(self, item: object, name: str, depth: int) -> None:
        self._count(depth)
        if isinstance(item, TensorRef):
            self._require_new(name, self.result.tensors)
            self.result.tensors[name] = item
        elif isinstance(item, dict) and self._holds(item):
            for key, inner in item.items():
                self._visit(inner, f"{name}.{_key(key)}", depth + 1)
        elif isinstance(item, list | tuple) and self._holds(item):
            for position, inner in enumerate(item):
                self._visit(inner, f"{name}.{position}", depth + 1)
        else:
            self._note(item, name, depth)

    def _note(self, item: object, name: str, depth: int) -> None:
        self._require_new(name, self.result.metadata)
        plain = self._plain(item, depth)
        self.result.metadata[name] = plain if isinstance(plain, str) else json.dumps(plain)

    def _plain(self, item: object, depth: int) -> Json:
        """A value without tensors, as JSON."""
        self._count(depth)
        match item:
            case None | bool() | int() | float() | str():
                return item
            case bytes():
                return item.hex()
            case Named():
                return item.name
            case dict():
                return {_key(key): self._plain(inner, depth + 1) for key, inner in item.items()}
            case list() | tuple():
                return [self._plain(inner, depth + 1) for inner in item]
        return f"<{_kind(item)}>"

    def _holds(self, item: object, depth: int = 0) -> bool:
        """Whether there is a tensor anywhere in a value."""
        if isinstance(item, TensorRef):
            return True
        if not isinstance(item, dict | list | tuple):
            return False
        if id(item) not in self.holders:
            self._count(depth)
            # Also ends the search in a container that holds itself.
            self.holders[id(item)] = False
            inner = item.values() if isinstance(item, dict) else item
            self.holders[id(item)] = any(self._holds(part, depth + 1) for part in inner)
        return self.holders[id(item)]

    def _count(self, depth: int) -> None:
        """A small pickle can hold itself, or share parts so that walking it would never end."""
        self.visited += 1
        if depth > _DEEPEST or self.visited > 4 * self.limits.tensors:
            raise StoreError(f"{self.where}: its values are nested too deeply, or too many", code="limit")

    def _require_new(self, name: str, taken: dict[str, TensorRef] | dict[str, str]) -> None:
        require_name(name, self.where)
        if name in taken:
            raise StoreError(f"{self.where}: `{name}` stands twice", code="duplicate-key")


def _key(key: object) -> str:
    return key.name if isinstance(key, Named) else str(key)


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, TensorRef) else type(value).__name__
