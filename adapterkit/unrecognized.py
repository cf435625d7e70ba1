"""Why nothing explains a file: it is empty, it is something else, or its model has no table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from shlex import quote

from adapterkit.claims import Candidate, split
from adapterkit.errors import Json, Unrecognized
from adapterkit.specs.kinds import KINDS
from adapterkit.specs.layouts import Layout, layouts
from adapterkit.specs.other_files import known_as
from adapterkit.stores import Store

_LOOK = "`adapterkit inspect FILE --keys` shows what is in it"


def unrecognized(
    store: Store, keys: Sequence[tuple[str, str]], nearest: Sequence[Candidate] = ()
) -> Unrecognized:
    """The error for a file that no family and layout explain.

    keys: pairs (as in the file, without wrappers).  nearest: candidates that know too few of them.
    """
    what, hint = _cause(store, keys, nearest)
    return Unrecognized(
        f"{store.label}: {what}",
        hint=hint,
        details={
            "tensors": len(store.tensors),
            "first": list[Json](list(store.tensors)[:5]),
            "nearest": [
                {"family": c.family.name, "layouts": list[Json](c.layouts), "share": c.share} for c in nearest
            ],
        },
    )


def _cause(store: Store, keys: Sequence[tuple[str, str]], nearest: Sequence[Candidate]) -> tuple[str, str]:
    """(what is the matter, what to do)"""
    count = len(store.tensors)
    if not count:
        return "there are no tensors in it", "get the file again, or save the adapter again"
    first = ", ".join(f"`{key}`" for key in list(store.tensors)[:3])
    shown = f"{count} tensor{'s' * (count > 1)} ({first}{', …' if count > 3 else ''})"
    if nearest:
        return (
            f"nothing explains it; nearest: {_nearest(nearest)} of {shown}",
            f"if it is for that model, say --family {quote(nearest[0].family.key)}; {_LOOK}",
        )
    if (kind := _kind(keys)) is not None:
        return (
            f"{kind} for a model that no table knows: {shown}",
            "`adapterkit formats` lists the base models there are; formats/README.md says how one is added",
        )
    if (other := known_as(key for _, key in keys)) is not None:
        return (
            f"{other}, not an adapter: {shown}",
            f"adapterkit reads LoRA and its kin; {_LOOK}",
        )
    return (
        f"not an adapter: nothing in it is named as an adapter's tensors are: {shown}",
        f"weights of a model, such as a checkpoint, are no adapter; {_LOOK}",
    )


def _nearest(candidates: Sequence[Candidate]) -> str:
    """`sdxl as kohya 5 %, sd1 as kohya 4 %`"""
    return ", ".join(f"{c.family.key} as {' and '.join(c.layouts)} {100 * c.share:.0f} %" for c in candidates)


def _kind(keys: Sequence[tuple[str, str]]) -> str | None:
    """The kind of change that the ends of most keys speak of, in whatever layout; replacements are none."""
    counted = Counter[str]()
    for layout in layouts().values():
        counted |= _whole_modules(keys, layout)
    return KINDS[max(KINDS, key=lambda kind: counted[kind])].title if counted else None


def _whole_modules(keys: Sequence[tuple[str, str]], layout: Layout) -> Counter[str]:
    """Per kind, how many modules have all the tensors that it takes."""
    found = Counter[str]()
    for items in split(keys, layout).modules.values():
        roles: dict[str, set[str]] = {}
        for _, options in items:
            for option in options:
                roles.setdefault(option.kind, set()).add(option.role)
        for kind, given in roles.items():
            if kind and kind != "set" and any(required <= given for required in KINDS[kind].required):
                found[kind] += 1
    return found
