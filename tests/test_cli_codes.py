"""Every code has its explanation, every explanation its code; the same for the names of consents."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterkit.specs.consents import CONSENTS

ROOT = Path(__file__).parent.parent
TEXTS: dict[str, str] = tomllib.loads((ROOT / "formats" / "errors.toml").read_text(encoding="utf-8"))

# Codes that are made or passed on: the expression, and what it can be.
COMPUTED = {
    "f'no-{name}'": {"no-alpha", "no-magnitude"},
    # Reasons for leaving tensors out, in a loop over both.
    "reason": {"unclaimed", "incomplete"},
    # What a file that holds no tensors is instead; the second element of each answer.
    "code": {
        *("empty-file", "lfs-pointer", "web-page", "json-file", "gguf"),
        *("other-file", "truncated", "not-tensors"),
    },
}
# An error taken up as a problem keeps its code, and the base class takes any.
PASSED_ON = {"error.code", "code or self.default_code"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "adapterkit").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def code_expressions(tree: ast.Module) -> Iterator[ast.expr]:
    """`code=…` of calls, `default_code = …` of error classes, and the first argument of `Problem`."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword("code", value):
                yield value
            case ast.AnnAssign(ast.Name("default_code"), value=ast.expr() as value):
                yield value
            case ast.Assign([ast.Name("default_code")], value):
                yield value
            case ast.Call(ast.Name("Problem"), [value, *_]):
                yield value


def codes() -> set[str]:
    found: set[str] = set()
    for path, tree in sources():
        for value in code_expressions(tree):
            found |= _values(value, path)
    return found


def _values(value: ast.expr, path: Path) -> set[str]:
    match value:
        case ast.Constant(str(text)):
            return {text}
        case ast.IfExp(body=body, orelse=other):
            return _values(body, path) | _values(other, path)
    text = ast.unparse(value)
    if text in PASSED_ON:
        return set()
    assert text in COMPUTED, f"{path}:{value.lineno}: add what `{text}` can be to this test"
    return COMPUTED[text]


def test_every_code_is_explained_and_nothing_else_is() -> None:
    assert codes() == set(TEXTS)


@pytest.mark.parametrize("code", sorted(TEXTS))
def test_an_explanation_is_a_few_plain_sentences(code: str) -> None:
    text = TEXTS[code]
    assert text.endswith(".")
    assert text[0].isupper() or text.startswith(("`", "VeRA"))
    assert 1 <= text.count(". ") + 1 <= 4
    assert "\n" not in text
    assert len(text) < 400


def test_every_consent_that_is_asked_for_has_a_name_and_every_name_is_asked_for() -> None:
    assert _asked_consents() == set(CONSENTS)


def _asked_consents() -> set[str]:
    """Names compared with `allow` in the source; `reason` stands for both that its loop goes over."""
    found: set[str] = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            match node:
                case ast.Compare(ast.Constant(str(name)), [ast.In() | ast.NotIn()], [allow]) if ast.unparse(
                    allow
                ).endswith("allow"):
                    found.add(name)
                case ast.Compare(ast.Name("reason"), [ast.NotIn()], [ast.Name("allow")]):
                    found |= COMPUTED["reason"]
    return found
