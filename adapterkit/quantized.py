"""Bases whose weights are quantised: told by their tensors, and offered as if they were not.

A change is added to numbers, and codes are none: whoever adds it to them makes noise. So a quantised base is
refused, or read through `dequantized`, which offers each weight under its plain name.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from adapterkit.codings import CODINGS, Parts
from adapterkit.errors import Json, StoreError
from adapterkit.linalg.rounding import round_to
from adapterkit.specs.quantizations import Quantization, quantizations
from adapterkit.stores import DTYPES, Store, TensorInfo, torch_dtype
from adapterkit.stores.model_folder import CONFIG
from adapterkit.stores.views import bytes_of

if TYPE_CHECKING:
    import torch

# Numbers that no weight is kept in as they are: what a matrix of them means must be known.
_CODES = {"I8", "U8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}
_FEW = 1024
_PROBE = 1 << 16
_SETTINGS = "quantization_config"


@dataclass(frozen=True)
class _Weight:
    """A weight that is quantised: how, its tensors, and the shape it has when it is not."""

    method: Quantization
    parts: Parts
    shape: tuple[int, ...]

    def numbers(self) -> torch.Tensor:
        return CODINGS[self.method.coding].weight(self.parts)


@dataclass(frozen=True)
class _Recognized:
    """weights: by plain name. taken: tensors they are kept in, or that go with them. strange: the rest."""

    weights: Mapping[str, _Weight]
    taken: frozenset[str]
    strange: tuple[str, ...]


def quantization(store: Store) -> str | None:
    """How the weights are quantised ("gptq", say, or "unknown"), or None if they are not.

    From names, shapes and small tensors; 8-bit floats without a scale are no quantisation.
    """
    found = _recognized(store)
    names = {weight.method.name: None for weight in found.weights.values()}
    if found.strange:
        names["unknown"] = None
    return ", ".join(names) or None


def dequantized(store: Store, dtype: str = "BF16") -> Store:
    """The store with each quantised weight as one tensor, computed in float32 when it is asked for.

    dtype: safetensors' name of what they are rounded to; "F32" leaves them as they are. What belongs to them
    only is left out, and the configurations no longer speak of it. The store itself where nothing is
    quantised. It must stay open meanwhile, and closes with the one returned.
    Raises StoreError (code "quantized") for tensors that are quantised in a way that is not known.
    """
    found = _recognized(store)
    if found.strange:
        some = ", ".join(f"`{name}`" for name in found.strange[:5])
        raise StoreError(
            f"{store.label}: {len(found.strange)} tensors are quantised in a way that is not known: {some}",
            code="quantized",
            hint="give the base from which it was made, in fp16 or bf16",
            details={"tensors": list[Json](found.strange)},
        )
    return _Dequantized(store, found, dtype) if found.weights else store


class _Dequantized(Store):
    """A store behind which another one holds quantised weights."""

    def __init__(self, store: Store, found: _Recognized, dtype: str) -> None:
        self._store = store
        self._weights = found.weights
        self._dtype = dtype
        # A weight is asked for block by block, by several threads; each remembers the one it is at.
        self._last = threading.local()
        self.path = store.path
        self.kind = store.kind
        self.metadata = store.metadata
        self.warnings = store.warnings
        self.size = store.size
        self.sidecars = {name: _plain_config(name, value) for name, value in store.sidecars.items()}
        self.tensors = dict(self._plain_tensors(found.taken))

    def _plain_tensors(self, taken: frozenset[str]) -> Iterator[tuple[str, TensorInfo]]:
        """Weights stand where the first of their tensors stood."""
        homes = {
            name: plain for plain, weight in self._weights.items() for name in weight.parts.names.values()
        }
        given: set[str] = set()
        for name, info in self._store.tensors.items():
            plain = homes.get(name)
            if plain is not None and plain not in given:
                given.add(plain)
                yield plain, TensorInfo(plain, self._dtype, self._weights[plain].shape)
            elif name not in taken:
                yield name, info

    def read(self, name: str) -> memoryview:
        return bytes_of(self.tensor(name)) if name in self._weights else self._store.read(name)

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._weights:
            self.info(name)
            return self._store.tensor(name)
        last: tuple[str, torch.Tensor] | None = getattr(self._last, "weight", None)
        if last is None or last[0] != name:
            self._last.weight = None
            numbers = self._weights[name].numbers()
            last = (name, round_to(numbers, torch_dtype(self._dtype)))
            self._last.weight = last
        return last[1]

    def require_unchanged(self) -> None:
        self._store.require_unchanged()

    def release(self) -> None:
        self._store.release()

    def close(self) -> None:
        self._store.close()


def _plain_config(name: str, value: Json) -> Json:
    """A model's configuration without what it says of quantisation."""
    if name.rpartition("/")[2] != CONFIG or not isinstance(value, dict):
        return value
    return {key: entry for key, entry in value.items() if key != _SETTINGS}


def _recognized(store: Store) -> _Recognized:
    table = quantizations()
    weights: dict[str, _Weight] = {}
    taken = {name for name in store.tensors if name.rpartition(".")[2] in table.flags}
    strange: dict[str, None] = {}
    for name in store.tensors:
        fitting = _methods(name)
        found = next(filter(None, (_weight(store, method, stem) for method, stem in fitting)), None)
        if found is not None:
            method, stem, weight = found
            weights[stem + method.plain] = weight
            taken |= {*weight.parts.names.values(), *(stem + end for end in method.ignored)}
        elif any(_codes(store, method, stem) for method, stem in fitting):
            strange[name] = None
    strange |= {name: None for name in store.tensors if name not in taken and _is_coded(store, name)}
    strange |= {} if weights or strange else dict.fromkeys(_unseen_settings(store))
    return _Recognized(weights, frozenset(taken), tuple(name for name in strange if name not in taken))


def _methods(name: str) -> list[tuple[Quantization, str]]:
    """The methods whose mark a tensor may be, each with what stands before it; the longest end is meant."""
    fitting = [(method, mark) for method, mark in _marks() if name.endswith(mark)]
    longest = max((len(mark) for _, mark in fitting), default=0)
    return [(method, name.removesuffix(mark)) for method, mark in fitting if len(mark) == longest]


@cache
def _marks() -> tuple[tuple[Quantization, str], ...]:
    methods = quantizations().methods.values()
    return tuple((method, mark) for method in methods for mark in method.tensors[method.mark])


def _weight(store: Store, method: Quantization, stem: str) -> tuple[Quantization, str, _Weight] | None:
    """The weight that stands behind a stem, if it is quantised by this method."""
    names = {role: _spelled(store, stem, ends) for role, ends in method.tensors.items()}
    there = {role: name for role, name in names.items() if name is not None}
    if not method.tensors.keys() - method.optional <= there.keys():
        return None
    if any(stem + end in store.tensors for end in method.unless):
        return None
    parts = Parts(store, there, _settings(store, stem))
    shape = CODINGS[method.coding].shape(parts)
    return None if shape is None else (method, stem, _Weight(method, parts, shape))


def _spelled(store: Store, stem: str, ends: tuple[str, ...]) -> str | None:
    return next((stem + end for end in ends if stem + end in store.tensors), None)


def _codes(store: Store, method: Quantization, stem: str) -> bool:
    """Whether a mark without a weight that fits it stands beside something that could be its codes."""
    name = _spelled(store, stem, method.tensors["codes"])
    return name is not None and store.info(name).dtype not in {"F16", "BF16", "F32", "F64"}


def _is_coded(store: Store, name: str) -> bool:
    """A matrix of small integers. Places are counted in 64 bits, or are few; masks are all 0 and 1."""
    info = store.info(name)
    if info.dtype not in _CODES or len(info.shape) < 2 or info.elements < _FEW:
        return False
    return DTYPES[info.dtype].bits > 8 or bool(bytes(store.read(name)[:_PROBE]).translate(None, b"\0\1"))


def _settings(store: Store, name: str) -> Mapping[str, Json]:
    """What the configuration of the model that a tensor belongs to says of its quantisation."""
    folder = name.rpartition("/")[0]
    config = store.sidecars.get(f"{folder}/{CONFIG}" if folder else CONFIG)
    settings = config.get(_SETTINGS) if isinstance(config, dict) else None
    return settings if isinstance(settings, dict) else {}


def _unseen_settings(store: Store) -> Iterator[str]:
    """Configurations that speak of a quantisation of which no tensor shows anything."""
    for name, value in store.sidecars.items():
        if name.rpartition("/")[2] == CONFIG and isinstance(value, dict) and value.get(_SETTINGS):
            yield name
