"""Files written once in every layout and kind: they are read as they were meant, today and ever after."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypedDict

import pytest
import torch
from golden_kinds import base, probe

from adapterkit import open as open_adapter
from adapterkit.adapter import Adapter
from adapterkit.specs.families import Place
from adapterkit.specs.layouts import layouts

FOLDER = Path(__file__).parent.parent / "fixtures" / "golden"


class Delta(TypedDict):
    """norm: Frobenius.  probe: the sum of its numbers times `probe`'s.  None where no file tells them."""

    shape: list[int]
    norm: float | None
    probe: float | None


@dataclass(frozen=True)
class Facts:
    """What stands beside a golden file. deltas: by the canonical name of the tensor that is changed."""

    what: str
    family: str
    layouts: list[str]
    kinds: list[str]
    deltas: dict[str, Delta]


def golden() -> list[Path]:
    """The facts of every file, by name."""
    return sorted(FOLDER.glob("*.json"))


def facts_of(path: Path) -> Facts:
    return Facts(**json.loads(path.read_text(encoding="utf-8")))


def file_of(path: Path) -> Path:
    """The tensors that a .json speaks of: a file or a folder of the same name."""
    return next(
        found for found in (path.with_suffix(s) for s in ("", ".safetensors", ".pt")) if found.exists()
    )


def kinds_of(adapter: Adapter) -> set[str]:
    return {change.kind for changes in adapter.changes.values() for change in changes}


def deltas_of(adapter: Adapter, meant: Mapping[str, Delta]) -> dict[str, Delta]:
    """Those of an adapter, on the base that those beside the files were computed on."""
    found: dict[str, Delta] = {}
    for place, (change,) in adapter.changes.items():
        first = next(names(place))
        if change.kind == "tlora":
            found[first] = {"shape": list(change.shape), "norm": None, "probe": None}
            continue
        shape = change.shape or meant[first]["shape"]
        dense = change.dense(torch.from_numpy(base(*shape)), torch.float64)
        for name, rows in zip(names(place), heights(place, len(dense)), strict=True):
            part = dense[slice(*rows)]
            turn = float((part * torch.from_numpy(probe(*part.shape))).sum())
            found[name] = {"shape": list(part.shape), "norm": float(part.norm()), "probe": turn}
    return found


def names(place: Place) -> Iterator[str]:
    for piece in place.span:
        yield ".".join(filter(None, (place.component, piece.module, place.param)))


def heights(place: Place, rows: int) -> Iterator[tuple[int, int]]:
    """First and last row of each piece, by their shares."""
    shares = [piece.weight * (piece.stop - piece.start) for piece in place.span]
    start = Fraction(0)
    for share in shares:
        stop = start + Fraction(rows) * share / sum(shares)
        yield int(start), int(stop)
        start = stop


@pytest.mark.parametrize("path", golden(), ids=lambda path: path.stem)
def test_a_golden_file_is_what_it_was_meant_to_be(path: Path) -> None:
    facts = facts_of(path)
    with open_adapter(file_of(path)) as opened:
        explanation = opened.explanation
        assert (explanation.family.name, list(explanation.layouts)) == (facts.family, facts.layouts)
        assert (explanation.share, explanation.unclaimed, explanation.incomplete) == (1, (), ())
        adapter = opened.load()
        assert kinds_of(adapter) == set(facts.kinds)
        found = deltas_of(adapter, facts.deltas)
    assert found.keys() == facts.deltas.keys()
    for name, delta in facts.deltas.items():
        assert same(found[name], delta), (name, found[name], delta)


def same(found: Delta, meant: Delta) -> bool:
    """To seven digits of the norm; a probe may be small where the delta is not."""
    if meant["norm"] is None or meant["probe"] is None:
        return found == meant
    near = [found["norm"], found["probe"]] == pytest.approx(
        [meant["norm"], meant["probe"]], rel=1e-7, abs=1e-7 * meant["norm"]
    )
    return near and found["shape"] == meant["shape"]


def test_every_kind_of_every_layout_has_a_golden_file() -> None:
    have = {
        (layout, kind)
        for facts in map(facts_of, golden())
        for layout in facts.layouts
        for kind in facts.kinds
    }
    assert {(name, kind) for name, layout in layouts().items() for kind in layout.kinds()} <= have


def test_every_golden_file_has_its_row_in_the_readme() -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\w+) \| ([^|]*) \|$", readme, re.MULTILINE)
    assert rows[1:] == [(path.stem, facts_of(path).family, facts_of(path).what) for path in golden()]


def test_golden_files_are_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 20_000
    assert sum(path.stat().st_size for path in files) < 400_000
