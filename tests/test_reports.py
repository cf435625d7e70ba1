"""Numbers in words, and the patterns that many names are said in."""

from __future__ import annotations

import math

import pytest
from rich.console import Console, RenderableType

from adapterkit.key_patterns import key_patterns
from adapterkit.reports import words
from adapterkit.reports.words import (
    counted,
    error_words,
    facts,
    listed,
    percent,
    quantity,
    shape_words,
    size,
    tally,
)


def drawn(report: RenderableType, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(report)
    return captured.get()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (228_500_000, "228.5 MB"),
        (23_800_000_000, "23.8 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_sizes_are_in_powers_of_1000(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (2600, "2.6 K"), (56_033_280, "56.0 M"), (11_901_408_320, "11.9 B")],
)
def test_quantities_have_one_decimal(count: int, text: str) -> None:
    assert quantity(count) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (56_033_280, 11_901_408_320, "0.47 %"),
        (1, 45, "2.2 %"),
        (1, 8, "12 %"),
        (1, 1, "100 %"),
        (3, 2, "150 %"),
        (1, 10**6, "< 0.01 %"),
        (0, 5, "0 %"),
    ],
)
def test_shares_have_two_digits_that_count(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [(0.0, "0"), (1e-300, "1e-300"), (8.9e-16, "8.9e-16"), (0.0016, "0.0016"), (0.5, "0.5"), (math.inf, "∞")],
)
def test_an_error_is_nothing_only_if_it_is_nothing(error: float, text: str) -> None:
    assert error_words(error) == text


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ([()], "scalar"),
        ([(16, 3072)], "16×3072"),
        ([(320, 16), (1280, 16)], "320–1280×16"),
        ([(8, 8), (8, 8, 3, 3)], "8×8 or 8×8×3×3"),
    ],
)
def test_shapes_are_said_together(shapes: list[tuple[int, ...]], text: str) -> None:
    assert shape_words(shapes) == text


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"LoRA": 3}, "LoRA"),
        ({"a": 1, "b": 2}, "b (2), a (1)"),
        (dict.fromkeys("abcdef", 1), "a (1), b (1), c (1), d (1), 2 more"),
    ],
)
def test_a_tally_begins_with_the_most_frequent(counts: dict[str, int], text: str) -> None:
    assert tally(counts) == text


def test_one_is_singular() -> None:
    assert (counted(1, "module"), counted(2, "module"), counted(0, "key")) == (
        "1 module",
        "2 modules",
        "0 keys",
    )


def test_long_text_is_cut_and_says_how_long_it_was() -> None:
    assert words.shortened("x" * 10, 10) == "x" * 10
    assert words.shortened("x" * 11, 10) == "x" * 10 + "… (11 characters)"
    assert words.shortened("\x1b" * 2, 10) == "\\x1b\\x1b"


@pytest.mark.parametrize(
    "report", [facts([("a", "[b]x[/b] :smile:")]), listed([("[b]x[/b] :smile:",)], ("h",))]
)
def test_strings_are_never_markup(report: RenderableType) -> None:
    assert "[b]x[/b] :smile:" in drawn(report)


@pytest.mark.parametrize("width", [20, 40, 80])
def test_nothing_is_lost_where_it_is_narrow(width: int) -> None:
    name = "x" * 100
    for report in (facts([("label", name)]), listed([("1", name)], ("n", "name"), numbers=1)):
        text = drawn(report, width)
        assert text.count("x") == 100
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        (["a.0.w", "a.1.w", "a.2.w"], ["a.{0..2}.w"]),
        (["a_0_b.w", "a_7_b.w"], ["a_{0,7}_b.w"]),
        (["a.1.w", "a.3.w", "a.5.w", "a.7.w", "a.9.w"], ["a.{1,3,…,9}.w"]),
        (["a.0.fc1", "a.0.fc2"], ["a.0.fc1", "a.0.fc2"]),
        (["b", "a.4", "b.c"], ["b", "a.4", "b.c"]),
        (["a.0.1", "a.1.0"], ["a.{0..1}.{0..1}"]),
        (["a." + "1" * 5000], ["a." + "1" * 5000]),
    ],
)
def test_keys_that_differ_in_numbers_alone_are_one_pattern(keys: list[str], texts: list[str]) -> None:
    found = key_patterns(keys)
    assert [pattern.text for pattern in found] == texts
    assert sorted(key for pattern in found for key in pattern.keys) == sorted(keys)
    assert sum(pattern.count for pattern in found) == len(keys)
