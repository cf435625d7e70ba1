"""Whether the fields of PEFT's configuration that we rely on are what they should be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from adapterkit.errors import Json, StoreError


def require_fields(values: Mapping[str, Json], where: str) -> None:
    """StoreError naming the first field of another type than PEFT writes; null and absent are fine."""
    for name, (fits, what) in _FIELDS.items():
        value = values.get(name)
        if value is not None and not fits(value):
            raise _bad(where, name, f"is {_said(value)}, not {what}")
    for name in ("rank_pattern", "alpha_pattern"):
        table = values.get(name)
        for pattern in table if isinstance(table, dict) else ():
            _require_pattern(pattern, name, where)


def _is_number(value: Json) -> bool:
    """Finite, also as a float: JSON has integers that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_rank(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_flag(value: Json) -> bool:
    return isinstance(value, bool)


def _is_rank_or_mask(value: Json) -> bool:
    # AdaLoRA keeps which ranks it pruned: peft/tuners/adalora/layer.py, RankAllocator.mask_to_budget.
    return _is_rank(value) or (isinstance(value, list) and all(map(_is_flag, value)))


def _is_table_of(fits: Callable[[Json], bool]) -> Callable[[Json], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _are_texts(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_rows(value: Json) -> bool:
    """A list of row numbers, or one for each of several embeddings."""
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(rows, list) and all(map(_is_rank, rows)) for rows in lists)


_NUMBER = (_is_number, "a finite number")
_RANK = (_is_rank, "a whole number")
_FLAG = (_is_flag, "true or false")
_FIELDS: dict[str, tuple[Callable[[Json], bool], str]] = {
    "r": _RANK,
    "init_r": _RANK,
    "lora_alpha": _NUMBER,
    "alpha": _NUMBER,
    "rank_pattern": (_is_table_of(_is_rank_or_mask), "an object of whole numbers"),
    "alpha_pattern": (_is_table_of(_is_number), "an object of finite numbers"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "block_share": _FLAG,
    "use_cayley_neumann": _FLAG,
    "num_cayley_neumann_terms": _RANK,
    "target_parameters": (_are_texts, "a list of names"),
    "trainable_token_indices": (_are_rows, "a list of row numbers"),
    "token_indices": (_are_rows, "a list of row numbers"),
}


def _require_pattern(pattern: str, name: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        raise _bad(where, name, f"has a key that is no regular expression: {_said(pattern)}") from None
    if not _is_tame(pattern):
        raise _bad(where, name, f"has a key that could take for ever to match: {_said(pattern)}")


def _is_tame(pattern: str) -> bool:
    """False if a group is repeated that itself repeats something, or chooses.

    Python tries such a group in exponentially many ways before it gives up.
    """
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)
    wild = [False]
    for position, sign in enumerate(plain):
        if sign == "(":
            wild.append(False)
        elif sign == ")":
            inner = wild.pop()
            if inner and plain[position + 1 : position + 2] in {"*", "+", "{"}:
                return False
            wild[-1] |= inner
        elif sign in "*+{|":
            wild[-1] = True
    return True


def _said(value: Json) -> str:
    text = repr(value)
    return f"`{text if len(text) <= 40 else text[:40] + '…'}`"


def _bad(where: str, name: str, what: str) -> StoreError:
    return StoreError(
        f"{where}: `{name}` {what}",
        code="bad-config",
        hint="correct it, or get the file again; without it the scales are not known",
        details={"field": name},
    )
