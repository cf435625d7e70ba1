"""Whoever writes a table finds every setting of the language on its page."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from adapterkit import blocks
from adapterkit.specs import families, layouts

ROOT = Path(__file__).parent.parent / "formats"
PAGE = (ROOT / "README.md").read_text("utf-8")
SPELLED = {field.name for field in dataclasses.fields(layouts.Spelling)} - {"kind", "role", "suffix", "param"}


@pytest.mark.parametrize(
    "setting", sorted({*layouts._TOP_KEYS, *families._TOP_KEYS, *blocks._TOP_KEYS, *SPELLED, "key"})
)
def test_a_setting_stands_on_the_page(setting: str) -> None:
    assert any(mark in PAGE for mark in (f"`{setting}", f"\n{setting} ", f"[{setting}", f"\n{setting}  ")), (
        setting
    )


def test_every_file_of_facts_is_mentioned() -> None:
    for path in [*ROOT.glob("*.toml"), *(entry for entry in ROOT.iterdir() if entry.is_dir())]:
        assert path.name in PAGE
