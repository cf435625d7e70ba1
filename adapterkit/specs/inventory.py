"""What a network's canonical model has, tensor by tensor; the proof that a naming is whole rests on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.errors import SpecError
from adapterkit.specs.patterns import parse_path, parse_shape
from adapterkit.specs.values import (
    Constants,
    Table,
    as_constants,
    as_table,
    as_text,
    as_texts,
    refuse_unknown,
)

# The params of a thing: what stands behind its name in its tensors' names.
BARE = ("",)
WITHOUT_BIAS = ("weight",)
WITH_BIAS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the canonical model has, in the order in which its file lists it.

    shapes: every tensor's shape.
    params: module -> WITH_BIAS or WITHOUT_BIAS; bare parameter -> BARE.
    order: module or bare parameter -> its place.
    """

    shapes: dict[str, tuple[int, ...]]
    params: dict[str, tuple[str, ...]]
    order: dict[str, int]

    def locate(self, name: str) -> tuple[str, str | None] | None:
        """(module, param) of a name as a row writes it; None if the model has no such thing.

        The param is None for a whole module, "" for a bare parameter.
        """
        params = self.params.get(name)
        if params is not None:
            return name, "" if params == BARE else None
        module, _, param = name.rpartition(".")
        if param in self.params.get(module, ()):
            return module, param
        return None

    def tensors(self, module: str, param: str | None) -> list[str]:
        """The canonical tensors that a row of this module and param stands for."""
        return [tensor_name(module, each) for each in (self.params[module] if param is None else (param,))]


def tensor_name(module: str, param: str) -> str:
    return f"{module}.{param}" if param else module


def build_inventory(blocks: list[Table], constants: Constants, where: str) -> Inventory:
    """The inventory of the [[inventory]] blocks. Raises SpecError."""
    shapes: dict[str, tuple[int, ...]] = {}
    params: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        refuse_unknown(block, ("at", "modules", "tensors", "sizes"), where)
        for name, its_params, shape in _things(block, constants, where):
            if name in params:
                raise SpecError(f"{where}: `{name}` is there twice", code="spec-duplicate")
            params[name] = its_params
            for param in its_params:
                tensor = tensor_name(name, param)
                if tensor in shapes:
                    raise SpecError(f"{where}: `{tensor}` is there twice", code="spec-duplicate")
                shapes[tensor] = shape[:1] if param == "bias" else shape
    return Inventory(shapes, params, {module: place for place, module in enumerate(params)})


Thing = tuple[str, tuple[str, ...], tuple[int, ...]]


def _things(block: Table, constants: Constants, where: str) -> Iterator[Thing]:
    """(name, params, shape) of everything one block lists, prefix by prefix."""
    for prefixes, known in _places(block, constants, where):
        modules = list(_entries(block.get("modules", {}), known, where))
        tensors = list(_entries(block.get("tensors", {}), known, where))
        for prefix in prefixes:
            for name, shape, has_bias in modules:
                yield prefix + name, WITH_BIAS if has_bias else WITHOUT_BIAS, shape
            for name, shape, has_bias in tensors:
                if has_bias:
                    raise SpecError(f"{where}: the bare parameter `{name}` cannot have a bias")
                yield prefix + name, BARE, shape


def _places(block: Table, constants: Constants, where: str) -> Iterator[tuple[list[str], Constants]]:
    """The prefixes of `at`; where it is a table, each path comes with constants of its own."""
    at = block.get("at")
    if at is None:
        yield [""], constants
    elif isinstance(at, dict):
        for text, own in at.items():
            prefixes = [f"{name}." for name in parse_path(text, constants, where).names()]
            yield prefixes, {**constants, **as_constants(own, f"{where}: `{text}`")}
    else:
        yield prefixes_of(at, constants, where), constants


def prefixes_of(value: object, constants: Constants, where: str) -> list[str]:
    """What a path or a list of paths stands for, each with its dot."""
    paths = [parse_path(text, constants, where) for text in as_texts(value, where)]
    return [f"{name}." for path in paths for name in path.names()]


def _entries(value: object, constants: Constants, where: str) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    for key, text in as_table(value, where).items():
        here = f"{where}: `{key}`"
        shape, has_bias = parse_shape(as_text(text, here), constants, here)
        for name in parse_path(key, constants, where).names():
            yield name, shape, has_bias
