"""The language of formats/networks: what it means, and what it refuses."""

from __future__ import annotations

import tomllib
from fractions import Fraction
from math import prod
from pathlib import Path

import pytest
from oracle_rows import shapes_of

from adapterkit.errors import SpecError
from adapterkit.specs.names import Naming, Network, Piece, Row, network, network_names, parse_network
from adapterkit.specs.paths import formats_dir

HEAD = 'summary = "a toy"\ncanonical = "ours"\nsource = "made up"\n'
INVENTORY = """
[[inventory]]
[inventory.modules]
"q" = "4 2 +b"
"k" = "4 2 +b"
"v" = "4 2 +b"
"mlp" = "16 2 +b"
"plain" = "4 2"
"wide" = "4 3 +b"
"norm" = "4 +b"
[inventory.tensors]
"table" = "6 2"
[[inventory]]
at = "blocks.{0..2}"
[inventory.modules]
"in" = "2 2"
"out" = "2 2"
"""


def load(*texts: str) -> Network:
    (only,) = load_all(*texts)
    return only


def load_all(*texts: str) -> list[Network]:
    return parse_network(Path("toy.toml"), tomllib.loads("".join(texts)))


def toy(names: str, *, block: str = "partial = true") -> Network:
    """The toy with one naming `theirs`, partial unless said otherwise."""
    return load(HEAD, INVENTORY, f"[[theirs]]\n{block}\n[theirs.names]\n{names}\n")


def row(naming: Naming, native: str) -> Row:
    found = naming.find(native)
    assert found is not None
    return found


def spelled(span: tuple[Piece, ...]) -> list[str]:
    return [piece.module for piece in span]


# What it means


def test_the_canonical_naming_is_the_inventory_itself() -> None:
    ours = toy('"a" = "q"').namings["ours"]
    assert row(ours, "q") == Row("q", (Piece("q"),), None)
    assert row(ours, "table") == Row("table", (Piece("table"),), "")
    assert not ours.partial


def test_the_inventory_gives_every_tensor_its_shape() -> None:
    shapes = load(HEAD, '[[inventory]]\n[inventory.modules]\n"a" = "4 2 3 3 +b"\n"n" = "5"\n').shapes
    assert dict(shapes) == {"a.weight": (4, 2, 3, 3), "a.bias": (4,), "n.weight": (5,)}


def test_a_network_knows_its_weights_and_how_many_numbers_it_holds() -> None:
    small = load(HEAD, '[[inventory]]\n[inventory.modules]\n"a" = "4 2 +b"\n[inventory.tensors]\n"t" = "6"\n')
    assert small.weight_shape("a") == (4, 2)
    assert small.weight_shape("t") == (6,)
    assert small.weight_shape("b") is None
    assert small.parameters == 4 * 2 + 4 + 6


def test_a_stack_keeps_its_order_and_its_parts_their_heights() -> None:
    theirs = toy('"fused" = ["k", "q", "v", "4*mlp"]').namings["theirs"]
    assert row(theirs, "fused").span == (Piece("k"), Piece("q"), Piece("v"), Piece("mlp", weight=4))


def test_a_part_is_a_share_of_the_rows_counted_from_zero() -> None:
    theirs = toy('"swapped" = ["q[1/2]", "q[0/2]"]').namings["theirs"]
    half = Fraction(1, 2)
    assert row(theirs, "swapped").span == (Piece("q", half, Fraction(1)), Piece("q", Fraction(0), half))


@pytest.mark.parametrize(
    ("right", "param"), [("q", None), ("q.weight", "weight"), ("q.bias", "bias"), ("table", "")]
)
def test_a_row_is_of_a_module_or_of_one_tensor(right: str, param: str | None) -> None:
    assert row(toy(f'"x" = "{right}"').namings["theirs"], "x").param == param


def test_a_transposed_tensor_says_so() -> None:
    theirs = toy('"projection" = "plain.weight.T"').namings["theirs"]
    assert row(theirs, "projection") == Row("projection", (Piece("plain", transposed=True),), "weight")


def test_ranges_walk_together_from_left_to_right() -> None:
    theirs = toy('"layer.{5..7}.a" = "blocks.{0..2}.in"').namings["theirs"]
    assert {r.native: spelled(r.span) for r in theirs.rows} == {
        "layer.5.a": ["blocks.0.in"],
        "layer.6.a": ["blocks.1.in"],
        "layer.7.a": ["blocks.2.in"],
    }


def test_several_ranges_make_every_combination() -> None:
    grid = '[[inventory]]\nat = "a.{0..1}"\n[inventory.modules]\n"b{0..1}" = "2 2"\n'
    names = '[[theirs]]\n[theirs.names]\n"x.{3..4}.{7..8}" = "a.{0..1}.b{0..1}"\n'
    theirs = load(HEAD, grid, names).namings["theirs"]
    assert {r.native: spelled(r.span) for r in theirs.rows} == {
        "x.3.7": ["a.0.b0"],
        "x.3.8": ["a.0.b1"],
        "x.4.7": ["a.1.b0"],
        "x.4.8": ["a.1.b1"],
    }


def test_at_puts_a_prefix_before_both_sides() -> None:
    block = 'partial = true\nsame = ["in"]\nat = { "x.{1..2}" = "blocks.{0..1}" }'
    theirs = toy('"o" = "out"', block=block).namings["theirs"]
    assert {r.native: spelled(r.span) for r in theirs.rows} == {
        "x.1.in": ["blocks.0.in"],
        "x.1.o": ["blocks.0.out"],
        "x.2.in": ["blocks.1.in"],
        "x.2.o": ["blocks.1.out"],
    }


def test_rows_come_in_the_order_of_the_inventory() -> None:
    theirs = toy('"third" = "v"\n"first" = "q"\n"second" = "k"').namings["theirs"]
    assert [r.native for r in theirs.rows] == ["first", "second", "third"]


def test_extends_takes_what_is_not_spelled_anew() -> None:
    text = """
[[base]]
partial = true
[base.names]
"fused" = ["q", "k", "v"]
"n" = "norm"
[[derived]]
extends = "base"
partial = true
[derived.names]
"fused.0" = "q"
"fused.1" = "k"
"""
    derived = load(HEAD, INVENTORY, text).namings["derived"]
    assert [r.native for r in derived.rows] == ["fused.0", "fused.1", "n"]


def test_numbered_modules_are_called_by_their_place_through_all_blocks() -> None:
    text = """
[[counted]]
partial = true
numbered = { at = ["blocks.{0..1}"], names = ["out", "in"] }
[[counted]]
numbered = { names = ["q"] }
"""
    counted = load(HEAD, INVENTORY, text).namings["counted"]
    expected = ["blocks.0.out", "blocks.0.in", "blocks.1.out", "blocks.1.in", "q"]
    assert [spelled(row(counted, str(n)).span) for n in range(5)] == [[name] for name in expected]


SIZES = """
[sizes.small]
last = 0
d = 2
kernel = ""
[sizes.large]
last = 1
d = 4
kernel = "3 3"
[[inventory]]
at = "b.{0..last}"
[inventory.modules]
"a" = "d 8 kernel +b"
[[inventory]]
sizes = ["large"]
[inventory.modules]
"extra" = "d"
[[theirs]]
[theirs.names]
"x{0..last}" = "b.{0..last}.a"
[[theirs]]
sizes = ["large"]
same = ["extra"]
[[only_large]]
sizes = ["large"]
partial = true
same = ["extra"]
"""


def test_each_size_is_a_network_of_its_own() -> None:
    small, large = load_all(HEAD, SIZES)
    assert (small.name, large.name) == ("small", "large")
    assert dict(small.shapes) == {"b.0.a.weight": (2, 8), "b.0.a.bias": (2,)}
    assert large.shapes["b.1.a.weight"] == (4, 8, 3, 3)
    assert large.shapes["extra.weight"] == (4,)
    assert list(small.namings) == ["ours", "theirs"]
    assert list(large.namings) == ["ours", "theirs", "only_large"]


def test_a_prefix_may_bring_constants_of_its_own() -> None:
    text = (
        "[[inventory]]\n"
        'at = { "up.{0..1}" = { i = 2, o = 4 }, "down" = { i = 8, o = 2 } }\n'
        '[inventory.modules]\n"a" = "o i"\n'
    )
    shapes = load(HEAD, text).shapes
    assert dict(shapes) == {"up.0.a.weight": (4, 2), "up.1.a.weight": (4, 2), "down.a.weight": (2, 8)}


def test_a_range_may_be_empty_so_that_a_size_can_lack_a_part() -> None:
    text = '[[inventory]]\n[inventory.modules]\n"a" = "2 2"\n"b.{0..-1}" = "2 2"\n'
    assert list(load(HEAD, text).shapes) == ["a.weight"]


def test_look_ups_answer_for_what_is_there_and_only_for_that() -> None:
    theirs = toy('"x.y" = ["q", "k"]\n"z.w" = "plain.weight"').namings["theirs"]
    fused, single = row(theirs, "x.y"), row(theirs, "z.w")
    assert theirs.find("x_y", dot="_") is fused
    assert theirs.find("x_y") is None
    assert theirs.find("x.y", dot="_") is None
    assert theirs.at((Piece("q"), Piece("k")), "bias") is fused
    assert theirs.at((Piece("k"), Piece("q")), "weight") is None
    assert theirs.at((Piece("plain"),), "weight") is single
    assert theirs.at((Piece("plain"),), "bias") is None
    assert theirs.covering("k") == (fused,)
    assert theirs.covering("v") == ()


def test_pieces_differ_in_every_field() -> None:
    pieces = [Piece("q"), Piece("k"), Piece("q", Fraction(1, 2)), Piece("q", stop=Fraction(1, 2))]
    pieces += [Piece("q", weight=2), Piece("q", transposed=True)]
    assert len(set(pieces)) == len(pieces)
    assert {Piece("q"): "same"}[Piece("q", Fraction(0), Fraction(1))] == "same"


# What it refuses

WRONG_NAMES = [
    ('"a" = ["q", "k"]\n"b" = "k"', "`a` and `b` both cover rows of `k.weight`", "spec-overlap"),
    ('"a" = "q"\n"b" = "q.bias"', "`a` and `b` both cover rows of `q.bias`", "spec-overlap"),
    ('"a" = "q"\n"b" = "q[1/2]"', "`a` and `b` both cover rows of `q.weight`", "spec-overlap"),
    ('"a" = "q"\n"a.weight" = "k.weight"', "`a.weight` is spelled twice", "spec-duplicate"),
    ('"x{0..1}" = "blocks.{0..1}.in"\n"x1" = "q"', "`x1` is spelled twice", "spec-duplicate"),
    ('"a.b" = "q"\n"a_b" = "k"', "`a.b` and `a_b` are one name once flattened", "spec-flat"),
    ('"x.{0..1}" = "blocks.{0..2}.in"', "ranges of [2] and [3] steps", "spec-ranges"),
    ('"x.{0..2}" = "q"', "ranges of [3] and [] steps", "spec-ranges"),
    ('"x" = "blocks.{0..2}.in"', "ranges of [] and [3] steps", "spec-ranges"),
    ('"a" = "mpl"', "`a`: the model has no `mpl`", "spec-unknown-name"),
    ('"a" = "plain.bias"', "`a`: the model has no `plain.bias`", "spec-unknown-name"),
    ('"a" = ["q", "k.weight"]', "`a` stacks tensors of different kinds", "spec-stack"),
    ('"a" = ["q.weight", "k.bias"]', "`a` stacks tensors of different kinds", "spec-stack"),
    ('"a" = ["q", "plain"]', "`a` stacks a module with a bias and one without", "spec-stack"),
    ('"a" = ["q", "wide"]', "`wide.weight` [4, 3] does not fit on `q.weight` [4, 2]", "spec-stack"),
    ('"a" = ["q", "mlp"]', "`mlp.weight` gives 16 rows and `q.weight` 4", "spec-stack"),
    ('"a" = ["q", "2*k"]', "but their weights are 2 and 1", "spec-stack"),
    ('"a" = ["2*q", "2*k"]', "`a`: its weights have a common factor", "spec-stack"),
    ('"a" = "q[0/3]"', "the 4 rows of `q.weight` do not divide so", "spec-parts"),
    ('"a" = "q[2/2]"', "`q[2/2]`: parts count from 0 to 1", "spec"),
    ('"a" = "plain.T"', "a module cannot be transposed, only its weight", "spec-transposed"),
    ('"a" = ["plain.weight.T", "q.weight"]', ".T stands alone", "spec-transposed"),
    ('"a" = "plain.weight[0/2].T"', ".T stands alone", "spec-transposed"),
    ('"a" = "norm.weight.T"', "only a matrix can be transposed", "spec-transposed"),
    ('"a" = "0*q"', "`0*q` has no height", "spec"),
    ('"a" = "q[0/2"', "`q[0/2` is not understood", "spec"),
    ('"a" = "q + k"', "`q + k` is not a path", "spec"),
    ('"a..b" = "q"', "`a..b` has an empty part between dots", "spec"),
    ('"a{0..x}" = "q"', "`{0..x}` in `a{0..x}` is not a range of integers", "spec"),
    ('"a{3..0}" = "q"', "`{3..0}` in `a{3..0}` runs backwards", "spec"),
    ('"a{q|k}" = "q"', "`{q|k}` in `a{q|k}` is not a range of integers", "spec"),
    ('"a" = []', "`a` stands for nothing", "spec"),
    ('"a" = 3', "`a` must be a text", "spec"),
]


@pytest.mark.parametrize(("names", "message", "code"), WRONG_NAMES)
def test_a_wrong_row_is_refused_with_a_message_of_its_own(names: str, message: str, code: str) -> None:
    with pytest.raises(SpecError) as caught:
        toy(names)
    assert message in caught.value.message
    assert caught.value.code == code
    assert caught.value.message.startswith("toy.toml: naming `theirs`")


def test_two_blocks_cannot_spell_one_name() -> None:
    text = '[[theirs]]\npartial = true\nsame = ["q"]\n[[theirs]]\n[theirs.names]\n"q" = "k"\n'
    with pytest.raises(SpecError, match="`q` is spelled twice"):
        load(HEAD, INVENTORY, text)


SMALL = '[[inventory]]\n[inventory.modules]\n"a" = "4 2 +b"\n"c" = "4 2"\n'


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ('"x" = "a"', "1 of 3 tensors have no name: `c.weight`"),
        ('"x" = "c"', "2 of 3 tensors have no name: `a.weight`, `a.bias`"),
        ('"x" = "a.weight"\n"y" = "c"', "1 of 3 tensors have no name: `a.bias`"),
        ('"x" = "a[0/2]"\n"y" = "c"', "the rows from 1/2 to 1 of `a.weight` have no name"),
        ('"x" = ["a[0/4]", "a[2/4]", "a[3/4]"]\n"y" = "c"', "the rows from 1/4 to 1/2 of `a.weight`"),
    ],
)
def test_a_naming_must_reach_everything_unless_it_says_that_it_is_partial(names: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(HEAD, SMALL, f"[[theirs]]\n[theirs.names]\n{names}\n")
    assert message in caught.value.message
    assert caught.value.code == "spec-partial"
    assert (
        load(HEAD, SMALL, f"[[theirs]]\npartial = true\n[theirs.names]\n{names}\n").namings["theirs"].partial
    )


WRONG_DOCUMENTS = [
    ('canonical = "ours"\nsource = "s"\n' + SMALL, "toy.toml: summary must be a text"),
    (HEAD, "toy.toml: inventory must be one or more blocks"),
    (HEAD + SMALL + '[theirs]\nsame = ["a", "c"]', "naming `theirs` must be one or more blocks"),
    (HEAD + SMALL + '[[ours]]\nsame = ["a", "c"]', "naming `ours` is the canonical one"),
    (HEAD + SMALL + '[[theirs]]\nmodules = ["a"]', "naming `theirs`: `modules` is not known here"),
    (HEAD + SMALL + '[[theirs]]\npartial = "yes"', "partial must be true or false"),
    (HEAD + SMALL + '[[theirs]]\nextends = "base"', "extends `base`, which is not a naming written above it"),
    (HEAD + SMALL + '[[theirs]]\nsizes = ["huge"]\nsame = ["a"]', "no size is called `huge`"),
    (HEAD + SMALL + '[[theirs]]\nnumbered = { order = ["a"] }', "numbered: `order` is not known here"),
    (HEAD + SMALL + '[[theirs]]\nat = { "x.{0..1}" = "y" }', "`x.{0..1}` and `y` do not walk together"),
    (HEAD + '[[inventory]]\nname = "x"', "inventory: `name` is not known here"),
    (HEAD + '[[inventory]]\nmodules = { "a" = "4 x" }', "`4 x` is not a shape"),
    (HEAD + '[[inventory]]\nmodules = { "a" = "+b" }', "`+b` is not a shape"),
    (HEAD + '[[inventory]]\ntensors = { "a" = "4 +b" }', "the bare parameter `a` cannot have a bias"),
    (HEAD + SMALL + '[[inventory]]\nmodules = { "a" = "4" }', "`a` is there twice"),
    (HEAD + SMALL + '[[inventory]]\ntensors = { "a.bias" = "4" }', "`a.bias` is there twice"),
    (HEAD + '[[inventory]]\nat = { "a" = { d = true } }\nmodules = { "b" = "d" }', "`d` must be an integer"),
    (HEAD + "[sizes.small]\nd = 1.5\n" + SMALL, "sizes: `d` must be an integer or a text"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_DOCUMENTS)
def test_a_wrong_document_is_refused_with_a_message_of_its_own(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_all(text)
    assert message in caught.value.message


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(SpecError) as caught:
        toy('"a" = "blocks.1.inn"')
    assert caught.value.hint == "did you mean `blocks.1.in`?"


# What is there


def test_an_unknown_network_is_answered_with_the_nearest() -> None:
    with pytest.raises(SpecError) as caught:
        network("unet_sdlx")
    assert caught.value.code == "no-network"
    assert caught.value.hint == "did you mean `unet_sdxl`?"


def test_a_network_is_read_once() -> None:
    assert network("unet_sd1") is network("unet_sd1")


def test_the_names_of_networks_are_those_their_files_hold() -> None:
    files = sorted((formats_dir() / "networks").glob("*.toml"))
    documents = [(path, tomllib.loads(path.read_text(encoding="utf-8"))) for path in files]
    held = [one.name for path, document in documents for one in parse_network(path, document)]
    assert sorted(held) == sorted(network_names())


@pytest.mark.parametrize("name", network_names())
def test_every_row_is_found_by_all_it_is_known_by(name: str) -> None:
    for naming in network(name).namings.values():
        assert naming.rows
        for each in naming.rows:
            assert naming.find(each.native) is each
            assert naming.find(each.native.replace(".", "_"), dot="_") is each
            assert naming.at(each.span, each.param or "weight") is each or each.param == ""
            assert naming.at(each.span, each.param or "") is each
            assert all(each in naming.covering(piece.module) for piece in each.span)


@pytest.mark.parametrize("name", network_names())
def test_every_whole_naming_holds_as_many_numbers_as_the_model(name: str) -> None:
    one = network(name)
    whole = [naming for naming, rows in one.namings.items() if not rows.partial]
    assert {naming: sum(map(prod, shapes_of(one, naming).values())) for naming in whole} == dict.fromkeys(
        whole, one.parameters
    )
