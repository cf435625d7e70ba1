"""The rules of the house, read off the source: each is a function that finds breaches in a module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Which rooms a room may import from, besides itself. Imports point down only.
FACTS = {"errors", "specs.kinds"}
MATHEMATICS = FACTS | {"linalg", "deltas"}
# The middle is what stands in no folder: what a file is, the adapter it holds, what is to be written.
MIDDLE = {path.stem for path in (ROOT / "adapterkit").glob("*.py")} - {"__init__", "__main__", "errors"}
BELOW_MIDDLE = MATHEMATICS | {"specs", "stores"}
BELOW_OPERATIONS = BELOW_MIDDLE | MIDDLE | {"checks", "merging", "baking"}
MAY_IMPORT = {
    "errors": set[str](),
    "specs.kinds": set[str](),
    "linalg": {"errors"},
    "deltas": {"linalg"} | FACTS,
    "specs": FACTS,
    "stores": {"errors"},
    **dict.fromkeys(MIDDLE, BELOW_MIDDLE | MIDDLE),
    "merging": BELOW_MIDDLE | MIDDLE,
    "baking": BELOW_MIDDLE | MIDDLE,
    "checks": BELOW_MIDDLE | MIDDLE,
    "operations": BELOW_OPERATIONS,
    "reports": BELOW_OPERATIONS | {"operations"},
    "cli": BELOW_OPERATIONS | {"operations", "reports", ""},
    "__main__": {"cli"},
}
TOP = ""  # adapterkit/__init__.py, which may import anything, late

SHOWS = {"cli", "reports"}
LONGEST_MODULE = 500
LONGEST_FUNCTION = 60

# Pieces of names that files give to tensors. They belong in formats/.
TENSOR_NAMES = re.compile(
    r"""lora_(up|down|mid|A|B|E|unet|te\d?|embedding|magnitude)(?![a-z]) | lora_$ | hada_ | lokr_ | dora_scale
    | \b(oft|boft)_(blocks|R|s)\b | \bvera_ | \bia3_ | \.on_input | (?<!`)\.alpha\b
    | (double|single|joint|transformer|input|output|down|up)_blocks | (middle|mid)_block\b | resblocks
    | \bto_(q|k|v|out)\b | \b(add_)?[qkvo]_proj\b | self_attn | text_model\b | zero_convs
    | diffusion_model\b""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Module:
    """One module of the package; `name` without `adapterkit.`, empty for the package itself."""

    name: str
    source: str
    path: Path = Path("example.py")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def room(self) -> str:
        return room_of(self.name)

    @property
    def package(self) -> list[str]:
        """What a relative import starts from."""
        parts = ["adapterkit", *filter(None, self.name.split("."))]
        return parts if self.path.name == "__init__.py" else parts[:-1]


def room_of(name: str) -> str:
    return name if name in FACTS else name.partition(".")[0]


def modules() -> list[Module]:
    return [
        Module(
            ".".join(path.relative_to(ROOT / "adapterkit").with_suffix("").parts)
            .removesuffix("__init__")
            .rstrip("."),
            path.read_text(encoding="utf-8"),
            path.relative_to(ROOT),
        )
        for path in sorted((ROOT / "adapterkit").rglob("*.py"))
    ]


def imports_upward(module: Module) -> Iterator[str]:
    """Imports inside functions and under TYPE_CHECKING count as well."""
    if module.room == TOP:
        return
    if module.room not in MAY_IMPORT:
        yield f"1: room `{module.room}` has no place in the table of this test"
        return
    for line, name in _imports(module):
        if room_of(name) not in MAY_IMPORT[module.room] | {module.room}:
            yield f"{line}: {module.room} may not import `adapterkit.{name}`"


def _imports(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        for name in _imported_names(node, module):
            if name == "adapterkit" or name.startswith("adapterkit."):
                yield node.lineno, name.removeprefix("adapterkit").removeprefix(".")  # type: ignore[attr-defined]


def _imported_names(node: ast.AST, module: Module) -> list[str]:
    match node:
        case ast.Import(names):
            return [alias.name for alias in names]
        case ast.ImportFrom(source, names, level):
            above = module.package[: len(module.package) - level + 1] if level else []
            source = ".".join([*above, source] if source else above)
            return [_module_or_its_owner(source, alias.name) for alias in names]
        case ast.Call(
            ast.Name("import_module") | ast.Attribute(attr="import_module"), [ast.Constant(str(name)), *_]
        ):
            return [name]
    return []


def _module_or_its_owner(source: str, name: str) -> str:
    """`from a import b` imports a.b where that is a module, and otherwise a."""
    path = ROOT.joinpath(*source.split("."), name)
    return f"{source}.{name}" if path.is_dir() or path.with_suffix(".py").is_file() else source


def prints(module: Module) -> Iterator[str]:
    if module.room in SHOWS:
        return
    for node in ast.walk(module.tree):
        match node:
            case ast.Call(ast.Name("print" | "pprint")):
                yield f"{node.lineno}: prints"
            case ast.Attribute(ast.Name("sys"), "stdout" | "stderr" | "__stdout__" | "__stderr__"):
                yield f"{node.lineno}: writes to the terminal"
            case ast.Import() | ast.ImportFrom():
                for name in _imported_names(node, module):
                    if name.partition(".")[0] in {"click", "rich"}:
                        yield f"{node.lineno}: imports `{name}`"


def exits(module: Module) -> Iterator[str]:
    if module.room in {"cli", "__main__"}:
        return
    for node in ast.walk(module.tree):
        match node:
            case (
                ast.Call(ast.Name("exit" | "quit"))
                | ast.Attribute(ast.Name("sys"), "exit")
                | ast.Attribute(ast.Name("os"), "_exit" | "abort")
                | ast.Name("SystemExit")
            ):
                yield f"{node.lineno}: exits"


def unpickles(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(ast.Name("pickle" | "_pickle" | "cPickle" | "dill"), "load" | "loads"):
                yield f"{node.lineno}: runs whatever a pickle says"
            case ast.ImportFrom("pickle" | "_pickle", names) if {"load", "loads"} & {
                alias.name for alias in names
            }:
                yield f"{node.lineno}: runs whatever a pickle says"
            case ast.keyword("weights_only", ast.Constant(value)) if value is not True:
                yield f"{node.lineno}: lets torch run whatever a pickle says"


def swallows_errors(module: Module) -> Iterator[str]:
    """A handler of everything must end by raising again; cli may raise its exit instead."""
    for node in ast.walk(module.tree):
        match node:
            case ast.ExceptHandler() if _catches_everything(node.type):
                match node.body[-1]:
                    case ast.Raise(exc) if exc is None or module.room == "cli":
                        pass
                    case _:
                        yield f"{node.lineno}: swallows every error"
            case ast.Call(ast.Name("suppress") | ast.Attribute(attr="suppress")):
                if any(map(_catches_everything, node.args)):
                    yield f"{node.lineno}: swallows every error"


def _catches_everything(caught: ast.expr | None) -> bool:
    match caught:
        case None | ast.Name("Exception" | "BaseException"):
            return True
        case ast.Tuple(elements):
            return any(map(_catches_everything, elements))
    return False


def types_tensor_names(module: Module) -> Iterator[str]:
    """Docstrings may give examples."""
    docstrings = {
        id(node.value)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(module.tree):
        match node:
            case ast.Constant(str(text)) if id(node) not in docstrings and TENSOR_NAMES.search(text):
                yield f"{node.lineno}: a tensor name in Python, {text[:50]!r}: it belongs in formats/"


def is_long(module: Module) -> Iterator[str]:
    lines = module.source.count("\n")
    if lines > LONGEST_MODULE:
        yield f"1: {lines} lines: one room, one job?"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"{node.lineno}: {node.name} is {lines} lines long"


Rule = Callable[[Module], Iterator[str]]
RULES: list[Rule] = [imports_upward, prints, exits, unpickles, swallows_errors, types_tensor_names, is_long]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_module_breaks_a_rule_of_the_house(rule: Rule) -> None:
    breaches = [f"{module.path}:{found}" for module in modules() for found in rule(module)]
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (imports_upward, "errors", "import adapterkit.specs.kinds"),
        (imports_upward, "linalg.svd", "from adapterkit.deltas import LowRank"),
        (imports_upward, "deltas.low_rank", "from adapterkit.specs import families"),
        (imports_upward, "deltas.low_rank", "def f():\n    from adapterkit.stores import Store"),
        (imports_upward, "stores.base", "from ..deltas import LowRank"),
        (imports_upward, "stores.base", "from adapterkit.specs.kinds import KINDS"),
        (imports_upward, "specs.names", "if TYPE_CHECKING:\n    from adapterkit.deltas import LowRank"),
        (imports_upward, "detect", "from adapterkit.operations import inspect"),
        (imports_upward, "operations.bake", "from adapterkit import cli"),
        (imports_upward, "operations.bake", "import adapterkit"),
        (imports_upward, "reports.tables", "importlib.import_module('adapterkit.cli')"),
        (imports_upward, "cellar.wine", ""),
        (prints, "plan", "print('hello')"),
        (prints, "operations.bake", "sys.stderr.write('hello')"),
        (prints, "operations.bake", "from rich.console import Console"),
        (prints, "operations.bake", "import click"),
        (exits, "reports.tables", "sys.exit(1)"),
        (exits, "operations.bake", "raise SystemExit(1)"),
        (exits, "operations.bake", "os._exit(1)"),
        (unpickles, "stores.pickles", "pickle.load(file)"),
        (unpickles, "stores.pickles", "from pickle import loads"),
        (unpickles, "stores.pickles", "torch.load(path, weights_only=False)"),
        (swallows_errors, "plan", "try:\n    f()\nexcept:\n    pass"),
        (swallows_errors, "plan", "try:\n    f()\nexcept (OSError, Exception):\n    g()"),
        (
            swallows_errors,
            "plan",
            "try:\n    f()\nexcept BaseException as error:\n    raise ValueError from error",
        ),
        (swallows_errors, "plan", "with contextlib.suppress(Exception):\n    f()"),
        (types_tensor_names, "plan", "x = 'attn.to_q'"),
        (types_tensor_names, "plan", "x = f'{stem}.lora_up.weight'"),
        (types_tensor_names, "plan", "key.startswith('lora_unet_')"),
        (is_long, "plan", "def f():\n" + "    x = 1\n" * 60),
    ],
)
def test_a_breach_is_noticed(rule: Rule, module: str, source: str) -> None:
    assert list(rule(Module(module, source)))


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (imports_upward, "deltas.low_rank", "from adapterkit.specs.kinds import KINDS"),
        (imports_upward, "deltas.low_rank", "from adapterkit.specs import kinds"),
        (imports_upward, "stores.base", "from .guards import shown\nfrom ..errors import StoreError"),
        (imports_upward, "cli.main", "from adapterkit import errors, reports"),
        (imports_upward, "", "from adapterkit.cli import main"),
        (prints, "reports.tables", "from rich.table import Table\nprint('hello')"),
        (exits, "cli.main", "sys.exit(1)"),
        (
            unpickles,
            "stores.pickles",
            "class Reader(pickle.Unpickler): pass\ntorch.load(path, weights_only=True)",
        ),
        (swallows_errors, "plan", "try:\n    f()\nexcept BaseException:\n    g()\n    raise"),
        (swallows_errors, "plan", "try:\n    f()\nexcept OSError:\n    pass"),
        (types_tensor_names, "plan", '"""`attn.to_q`"""\ndef f():\n    """`lora_up`"""'),
        (types_tensor_names, "plan", "x = 'two ups, three downs, lora_alpha'"),
        (is_long, "plan", "def f():\n" + "    x = 1\n" * 59),
    ],
)
def test_what_is_allowed_passes(rule: Rule, module: str, source: str) -> None:
    assert not list(rule(Module(module, source)))


@pytest.mark.parametrize("name", ["", "cli", "stores", "specs.families", "detect"])
def test_reading_headers_does_not_load_torch(name: str) -> None:
    code = f"import sys, {'.'.join(filter(None, ['adapterkit', name]))}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_dependency_is_pinned_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["test"]
    pinned = re.findall(
        r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(pinned) == len(set(pinned))
    assert {re.split(r"[<>=!~; \[]", name)[0] for name in wanted} <= set(pinned)
