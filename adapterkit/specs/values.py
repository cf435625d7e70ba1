"""What stands in a TOML document, checked for its type: every wrong value is a SpecError that says where."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from adapterkit.errors import SpecError

Table = Mapping[str, object]
Constants = Mapping[str, int | str]


def as_table(value: object, where: str) -> Table:
    if not isinstance(value, dict):
        raise SpecError(f"{where} must be a table")
    return value


def as_blocks(value: object, where: str) -> list[Table]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise SpecError(f"{where} must be one or more blocks, written [[…]]")
    return value


def as_text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise SpecError(f"{where} must be a text")
    return value


def as_texts(value: object, where: str) -> list[str]:
    """One text, or a list of at least one."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise SpecError(f"{where} stands for nothing")
    return [as_text(item, where) for item in items]


def as_truth(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{where} must be true or false")
    return value


def as_constants(value: object, where: str) -> Constants:
    """Names that stand for a number, or for words of a shape."""
    constants: dict[str, int | str] = {}
    for key, item in as_table(value, where).items():
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise SpecError(f"{where}: `{key}` must be an integer or a text")
        constants[key] = item
    return constants


def refuse_unknown(table: Table, known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise SpecError(f"{where}: `{key}` is not known here", hint=f"known: {', '.join(sorted(known))}")
