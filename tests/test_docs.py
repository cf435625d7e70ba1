"""What the documentation says is so, and what there is stands in it."""

from __future__ import annotations

import contextlib
import inspect
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit import errors
from adapterkit.cli.app import app
from adapterkit.errors import AdapterkitError
from adapterkit.operations.catalogue import error_texts, formats, key_meanings
from adapterkit.specs.consents import CONSENTS
from adapterkit.specs.families import families
from adapterkit.specs.kinds import KINDS
from adapterkit.specs.layouts import layouts
from docs import examples, format_table

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs" / "decisions").glob("*.md")),
        ROOT / "formats" / "README.md",
    )
}
README, FORMATS, LIBRARY = PAGES["README.md"], PAGES["docs/formats.md"], PAGES["docs/library.md"]
# What users read; docs/commands.md has tests of its own.
MANUAL = ("README.md", "docs/formats.md", "docs/library.md")


def section(page: str, title: str) -> str:
    """What stands below a heading, up to the next of its level."""
    level, rest = re.findall(rf"^(#+) {re.escape(title)}\n(.*)", page, re.MULTILINE | re.DOTALL)[0]
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """The first column of the tables in a text, without heads."""
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    return [
        cell for cell in rows if cell not in {"---", "command", "function", "kind", "code", "class", "name"}
    ]


# Tables


@pytest.mark.parametrize("path", format_table.PAGES, ids=lambda path: path.name)
def test_tables_say_what_the_program_says(path: Path) -> None:
    page = path.read_text("utf-8")
    assert format_table.with_tables(page) == page, "python docs/format_table.py brings them up to date"


def test_every_table_stands_on_a_page() -> None:
    assert {name for page in (README, FORMATS) for name in format_table.marked(page)} == {
        *format_table.TABLES
    }


def test_a_table_that_is_out_of_date_is_noticed() -> None:
    page = README.replace("| [`xlabs`]", "| [`xlab`]")
    assert page != README
    assert format_table.with_tables(page) == README


# Examples


@pytest.mark.parametrize(
    "name", ["README.md", "docs/formats.md", pytest.param("docs/library.md", marks=pytest.mark.oracle)]
)
def test_examples_print_what_the_page_says(name: str, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        for result in examples.Session().run(PAGES[name]):
            assert result.matches, f"{result.now}\nis now printed; docs/examples.py brings it up to date"


def test_pages_with_examples_are_those_that_are_run() -> None:
    runnable = {"console", "python"}
    found = {
        name for name, page in PAGES.items() if any(b.language in runnable for b in examples.blocks(page))
    }
    assert found <= set(MANUAL)


def test_output_that_differs_is_noticed() -> None:
    page = "```console\n$ akit explain exists\nsomething else\n```\n"
    (result,) = examples.Session().run(page)
    assert not result.matches
    assert "something else" not in result.now


def test_hashes_are_not_compared_and_lines_may_be_left_out() -> None:
    page = f"```python\nprint('a'); print('b'); print('{'0' * 64}')\n```\n```text\n[…]\n{'f' * 64}\n```\n"
    (result,) = examples.Session().run(page)
    assert result.matches


# Names that the pages use


def commands_in(page: str) -> Iterator[list[str]]:
    """Command lines of ours, in console blocks and between back-ticks."""
    spans = [*re.findall(r"^\$ (.+)$", page, re.MULTILINE), *re.findall(r"`([^`\n]+)`", page)]
    for text in spans:
        if re.match(r"(adapterkit|akit) [a-z]", text):
            yield shlex.split(text)


def options_of(command: click.Command) -> set[str]:
    with click.Context(command) as context:
        return {name for option in command.get_params(context) for name in option.opts}


@pytest.mark.parametrize("name", PAGES)
def test_commands_that_a_page_names_exist(name: str) -> None:
    for _, command, *arguments in commands_in(PAGES[name]):
        assert command in app.commands
        given = {argument for argument in arguments if argument.startswith("-")}
        assert given <= options_of(app.commands[command])


@pytest.mark.parametrize("name", MANUAL)
def test_options_that_a_page_names_exist_and_take_what_it_gives_them(name: str) -> None:
    known = set().union(options_of(app), *(options_of(command) for command in app.commands.values()))
    values: Mapping[str, set[str]] = {
        "--to": {one.name for one in formats() if one.writes},
        "--allow": set(CONSENTS),
        "--family": {one.name for one in families()},
        "--as": {"lora"},
        "--scale-from": {"alpha", "config"},
        "--verify": {"none", "sample", "full"},
        "--dtype": {"fp32", "fp16", "bf16"},
    }
    # `make_files.py --rank` is a script's.
    used = set(re.findall(r"(?<![-\w])--[a-z][a-z-]*", PAGES[name])) - {"--rank"}
    assert used <= known
    for option, value in re.findall(r"(--[a-z-]+) ([a-z][a-z0-9-]*)`", PAGES[name]):
        assert option not in values or value in values[option]


def test_every_command_stands_in_the_readme() -> None:
    cells = first_cells(section(README, "Commands"))
    assert {shlex.split(cell.strip("`"))[1] for cell in cells} == set(app.commands)


def test_every_format_and_family_stands_in_the_readme() -> None:
    text = section(README, "Formats")
    assert all(f"[`{one.name}`]" in text for one in formats())
    assert all(f"| `{one.name}` |" in text and one.label in text for one in families())


def test_every_layout_and_every_variation_has_its_place() -> None:
    text = section(FORMATS, "Layouts")
    names = {name.replace("_", "-") for name in layouts()}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) == names
    variations = {one.name for one in formats()} - names
    assert {cell.strip("`") for cell in first_cells(section(text, "kohya"))} == variations


@pytest.mark.parametrize("name", layouts())
def test_sample_keys_are_keys_of_their_layout(name: str) -> None:
    text = section(section(FORMATS, "Layouts"), name.replace("_", "-"))
    (keys,) = re.findall(r"^```keys\n(.+?)^```$", text, re.MULTILINE | re.DOTALL)
    for key in keys.splitlines():
        meant = {meaning.layout for meaning in key_meanings(key)}
        assert layouts()[name].title in meant or (layouts()[name].bare and not meant)


def test_every_kind_and_every_consent_is_described() -> None:
    described = first_cells(section(FORMATS, "Kinds of change").split("<!--")[0])
    assert described == [kind.title for kind in KINDS.values()]
    assert all(
        f"| `{name}` | {text} |" in section(FORMATS, "What is refused") for name, text in CONSENTS.items()
    )


def test_codes_that_the_formats_name_exist() -> None:
    text = section(FORMATS, "What is refused").split("<!-- end -->")[1] + section(FORMATS, "Containers")
    codes = [cell.strip("`") for cell in first_cells(text)]
    codes += re.findall(r"`([a-z]+-[a-z-]+|truncated|gguf|unsafe)`", section(FORMATS, "Containers"))
    assert codes and set(codes) <= set(error_texts())


# The library


def signature(function: object) -> str:
    """A function's parameters without their types."""
    found = inspect.signature(function)  # type: ignore[arg-type]
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


def test_functions_of_the_library_stand_there_as_they_are() -> None:
    functions = {n: f for n in adapterkit.__all__ if inspect.isfunction(f := getattr(adapterkit, n))}
    rows = [cell.strip("`") for cell in first_cells(LIBRARY.split("## ")[0])]
    assert sorted(rows) == sorted(f"{name}{signature(function)}" for name, function in functions.items())
    assert all(re.search(rf"`[^`\n]*\b{name}\b", LIBRARY) for name in adapterkit.__all__)


def test_classes_of_errors_stand_there_with_their_exit_codes() -> None:
    found = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, AdapterkitError) and value is not AdapterkitError
    }
    rows = re.findall(r"^\| `(\w+)` \| (\d) \|", section(LIBRARY, "Errors"), re.MULTILINE)
    assert {name: int(code) for name, code in rows} == found


# What the readme says is not read

PROJ = "unet_double_blocks_0_img_attn_proj"
LORA = {f"lora_{PROJ}.lora_up.weight": (3072, 2), f"lora_{PROJ}.lora_down.weight": (2, 3072)}
NOT_READ: Mapping[str, tuple[Mapping[str, tuple[int, ...]], set[str]]] = {
    "bias_indices": (
        {**LORA, f"lora_{PROJ}.bias_indices": (2, 3), f"lora_{PROJ}.bias_values": (3,)},
        {"unclaimed"},
    ),
    "oft_blocks.0": ({f"oft_{PROJ}.oft_blocks.0": (4, 8, 8), **LORA}, {"unclaimed"}),
    ".___.layer.W_down": (
        {"x.to_q.___.layer.W_down": (2, 8), "x.to_q.___.layer.W_up": (8, 2), "x.to_q.___.alpha": ()},
        {"unrecognized", "ambiguous", "unclaimed"},
    ),
    "::lora::0": ({"x.to_q.weight::lora::0": (8, 2), "x.to_q.weight::lora::1": (2, 8)}, {"unrecognized"}),
    "Flattened names": (
        {"lora_unet_blocks_0_q.lora_up.weight": (8, 2), "lora_unet_blocks_0_q.lora_down.weight": (2, 8)},
        {"unrecognized"},
    ),
    "full checkpoints": ({"model.diffusion_model.out.2.weight": (4, 4)}, {"unrecognized"}),
    "textual inversions": ({"emb_params": (2, 768)}, {"unrecognized"}),
}


@pytest.mark.parametrize("named", NOT_READ)
def test_what_is_said_not_to_be_read_is_refused(named: str) -> None:
    shapes, codes = NOT_READ[named]
    assert named in section(README, "What it does not do yet")
    state: dict[str, Tensor] = {key: torch.zeros(shape) for key, shape in shapes.items()}
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.plan_conversion(state, "diffusers")
    assert caught.value.code in codes


def test_names_of_a_model_without_a_table_stay_and_a_note_says_so(tmp_path: Path) -> None:
    module = "blocks.0.self_attn.q"
    state = {f"{module}.lora_B.weight": torch.ones(8, 2), f"{module}.lora_A.weight": torch.ones(2, 8)}
    save_file({f"diffusion_model.{key}": value for key, value in state.items()}, tmp_path / "x.safetensors")
    place = shlex.quote(str(tmp_path))
    for line in ("--plan", f"-o {place}/y.safetensors"):
        printed = examples.output_of(f"akit convert {place}/x.safetensors --to diffusers {line}")
        assert "note: no table of this model is known" in printed
    assert set(load_file(tmp_path / "y.safetensors")) == {f"transformer.{key}" for key in state}


def test_gguf_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.open(path)
    assert caught.value.code == "gguf"
    assert "GGUF" in section(README, "What it does not do yet")


# Links and length


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[name]):
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists()
        assert not anchor or anchor in anchors(target.read_text("utf-8"))


def test_the_design_fits_on_three_pages_and_names_every_room() -> None:
    page = PAGES["docs/design.md"]
    rooms = {path.parent.name for path in (ROOT / "adapterkit").glob("*/__init__.py")}
    assert len(page.splitlines()) <= 150
    assert all(re.search(rf"\b{room}\b", section(page, "Rooms")) for room in rooms)


@pytest.mark.parametrize("name", [*MANUAL, "docs/design.md"])
def test_lines_are_no_wider_than_the_code(name: str) -> None:
    prose = [line for line in PAGES[name].splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 110
