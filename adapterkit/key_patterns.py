"""Many keys said in few lines: `blocks.{0..18}.attn.to_q.lora_up.weight`, never one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A longer run of digits counts nothing, and Python refuses to read one of thousands.
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d{1,18}(?![A-Za-z0-9])|(?<=_)\d{1,18}(?=_|\.|$)")


@dataclass(frozen=True, slots=True)
class KeyPattern:
    """text: the keys with their numbers as ranges.  keys: all of them, in order of appearance."""

    text: str
    keys: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.keys)

    @property
    def example(self) -> str:
        return self.keys[0]


def key_patterns(keys: Iterable[str]) -> list[KeyPattern]:
    """The keys grouped by what is left when their numbers are taken out, in order of appearance."""
    groups: dict[tuple[str, ...], list[tuple[str, tuple[int, ...]]]] = {}
    for key in keys:
        parts = tuple(_NUMBER.split(key))
        numbers = tuple(int(number) for number in _NUMBER.findall(key))
        groups.setdefault(parts, []).append((key, numbers))
    return [
        KeyPattern(_written(parts, [numbers for _, numbers in members]), tuple(key for key, _ in members))
        for parts, members in groups.items()
    ]


def _written(parts: Sequence[str], numbers: Sequence[Sequence[int]]) -> str:
    text = parts[0]
    for part, column in zip(parts[1:], zip(*numbers, strict=True), strict=True):
        text += _range(sorted(set(column))) + part
    return text


def _range(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if values[-1] - values[0] == len(values) - 1:
        return f"{{{values[0]}..{values[-1]}}}"
    if len(values) <= 4:
        return "{" + ",".join(map(str, values)) + "}"
    return f"{{{values[0]},{values[1]},…,{values[-1]}}}"
