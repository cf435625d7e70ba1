"""Rows land where they belong: fused weights taken apart and put together, checked from first principles.

Nothing here asks the program what a name means. Which rows of which tensor are meant is written out by hand
for the fused weights of FLUX.1 and Stable Diffusion 3, the delta is up @ down · alpha / rank, and the two
sides of a conversion are compared as dense matrices.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from adapters import File, converted
from fused_names import FORMATS, PARTS, Format
from torch import Tensor

from adapterkit import deltas
from adapterkit.deltas import Change
from adapterkit.errors import Mismatch, Untranslatable
from adapterkit.recut import Preparation, Source, recut
from adapterkit.specs.families import Place
from adapterkit.specs.names import Naming, Piece, Row, Span

H, RANK, COLUMNS = 6, 2, 5


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def file_of(layout: Format, parts: Mapping[str, int], alpha: Callable[[int], float]) -> File:
    """A LoRA of every module that has one of the parts, random, and an alpha for the n-th of them."""
    heights: dict[str, int] = {}
    for name in parts:
        module, runs = layout.names[name]
        heights[module] = max(heights.get(module, 0), *(stop for _, stop in runs))
    tensors: dict[str, Tensor] = {}
    for n, (module, height) in enumerate(heights.items()):
        stem = layout.stem(module)
        tensors[stem + layout.up] = numbers(height * H, RANK, seed=2 * n)
        tensors[stem + layout.down] = numbers(RANK, COLUMNS, seed=2 * n + 1)
        if layout.alpha:
            tensors[stem + ".alpha"] = torch.tensor(alpha(n))
    return File(tensors)


def parts_of(file: File, layout: Format, names: Sequence[str]) -> dict[str, Tensor]:
    """The dense delta of every part, in float64, from the file's tensors and the names above."""
    found = {}
    for name in names:
        module, runs = layout.names[name]
        whole = dense(file, layout, module)
        if whole is not None:
            found[name] = torch.cat([whole[start * H : stop * H] for start, stop in runs])
    return found


def dense(file: File, layout: Format, module: str) -> Tensor | None:
    stem = layout.stem(module)
    if stem + layout.up not in file.tensors:
        return None
    up, down = file.tensors[stem + layout.up].double(), file.tensors[stem + layout.down].double()
    return scale_of(file, stem, module, down.shape[0]) * (up @ down)


def scale_of(file: File, stem: str, module: str, rank: int) -> float:
    if stem + ".alpha" in file.tensors:
        return float(file.tensors[stem + ".alpha"]) / rank
    flat = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    config = file.sidecars.get("adapter_config.json") or {
        key.removeprefix("transformer."): value for key, value in flat.items()
    }
    patterns = config.get("alpha_pattern", {}).items()
    fitting = [alpha for pattern, alpha in patterns if re.fullmatch(rf"(.*\.)?{pattern}", module)]
    return float([*fitting, config.get("lora_alpha", rank)][0]) / rank


def check_parts(before: Mapping[str, Tensor], after: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    """Every part that was changed is changed by the same, and no other by anything."""
    for name in before.keys() | after.keys():
        one, two = before.get(name), after.get(name)
        if one is None or two is None:
            present = one if one is not None else two
            assert present is not None and not present.any(), name
        else:
            assert one.shape == two.shape
            assert float((one - two).norm()) <= tolerance * float(one.norm()), name


WAYS = [(family, a, b) for family, known in FORMATS.items() for a, b in permutations(known, 2)]


@pytest.mark.parametrize("family, here, there", WAYS)
def test_every_row_is_changed_by_what_changed_it_before(family: str, here: str, there: str) -> None:
    a, b, parts = FORMATS[family][here], FORMATS[family][there], PARTS[family]
    before = file_of(a, parts, lambda n: RANK * (1 + n % 5) / 4)
    after = converted(before, family, there)
    check_parts(parts_of(before, a, list(parts)), parts_of(after, b, list(parts)))


def test_down_is_never_put_in_another_order() -> None:
    """The halves of the last modulation are rows of up; several converters swap down's ranks as well."""
    stem, other = "lora_unet_final_layer_adaLN_modulation_1", "transformer.norm_out.linear"
    up, down = numbers(2 * H, RANK, seed=1), numbers(RANK, COLUMNS, seed=2)
    after = converted(
        File({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}), "flux1", "diffusers"
    )
    assert torch.equal(after.tensors[f"{other}.lora_A.weight"], down)
    assert torch.equal(after.tensors[f"{other}.lora_B.weight"], torch.cat([up[H:], up[:H]]))


# --- fused weights that are not all alike ---------------------------------------------------------

QKV = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
SINGLE = [
    f"transformer.single_transformer_blocks.0.{x}"
    for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
]
FUSED = "lora_unet_double_blocks_0_img_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_0_linear1"


def apart(stems: Sequence[str], ranks: Sequence[int], heights: Sequence[int], dtype: torch.dtype) -> File:
    tensors = {}
    for n, (stem, rank, height) in enumerate(zip(stems, ranks, heights, strict=True)):
        if rank:
            tensors[f"{stem}.lora_B.weight"] = numbers(height * H, rank, seed=n).to(dtype)
            tensors[f"{stem}.lora_A.weight"] = numbers(rank, COLUMNS, seed=n + 10).to(dtype)
    return File(tensors)


def product(file: File, stem: str, up: str = ".lora_B.weight", down: str = ".lora_A.weight") -> Tensor:
    return file.tensors[stem + up].double() @ file.tensors[stem + down].double()


def fused_delta(file: File, stem: str) -> Tensor:
    down = file.tensors[f"{stem}.lora_down.weight"]
    scale = float(file.tensors[f"{stem}.alpha"]) / down.shape[0]
    return scale * product(file, stem, ".lora_up.weight", ".lora_down.weight")


RANKS = {
    "equal": (2, 2, 2, 2),
    "unequal": (1, 2, 3, 4),
    "no proj_mlp": (2, 2, 2, 0),
    "only k": (0, 3, 0, 0),
    "only proj_mlp": (0, 0, 0, 2),
    "no q": (0, 2, 1, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", RANKS)
def test_members_of_a_fused_weight_come_back_as_they_were(case: str, dtype: torch.dtype) -> None:
    ranks, heights = RANKS[case], (1, 1, 1, 4)
    before = apart(SINGLE, ranks, heights, dtype)
    fused = converted(before, "flux1", "kohya")
    assert set(fused.tensors) == {f"{LINEAR1}.{x}" for x in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert fused.tensors[f"{LINEAR1}.lora_down.weight"].shape == (sum(ranks), COLUMNS)
    assert {fused.tensors[f"{LINEAR1}.lora_{x}.weight"].dtype for x in ("up", "down")} == {dtype}
    expected = [
        product(before, stem) if rank else torch.zeros(height * H, COLUMNS, dtype=torch.float64)
        for stem, rank, height in zip(SINGLE, ranks, heights, strict=True)
    ]
    assert torch.allclose(fused_delta(fused, LINEAR1), torch.cat(expected), rtol=0, atol=1e-14)
    after = converted(fused, "flux1", "diffusers")
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)


@pytest.mark.parametrize("alphas", [(4.0, 4.0, 4.0), (1.0, 8.0, 2.0), (0.3, 7.0, 29.3), (2.0, 0.0, 2.0)])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 4)])
def test_unequal_alphas_are_in_the_fused_delta(alphas: Sequence[float], ranks: Sequence[int]) -> None:
    before = apart(
        [stem.replace("transformer.", "diffusion_model.", 1) for stem in QKV], ranks, (1, 1, 1), torch.float32
    )
    stems = [f"diffusion_model.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    before.tensors.update({f"{stem}.alpha": torch.tensor(a) for stem, a in zip(stems, alphas, strict=True)})
    fused = converted(before, "flux1", "kohya")
    scaled = [a / r * product(before, stem) for stem, a, r in zip(stems, alphas, ranks, strict=True)]
    expected = torch.cat(scaled)
    found = fused_delta(fused, FUSED)
    assert float((found - expected).norm()) <= 1e-7 * float(expected.norm())
    if len(set(alphas)) == 1 and len(set(ranks)) == 1:
        assert torch.allclose(found, expected, rtol=0, atol=1e-14)


def test_a_file_that_came_from_a_fused_one_shares_down_and_keeps_its_rank() -> None:
    down = numbers(3, COLUMNS, seed=1)
    before = File(
        {f"{stem}.lora_B.weight": numbers(H, 3, seed=n + 2) for n, stem in enumerate(QKV)}
        | {f"{stem}.lora_A.weight": down.clone() for stem in QKV}
    )
    fused = converted(before, "flux1", "kohya")
    assert torch.equal(fused.tensors[f"{FUSED}.lora_down.weight"], down)
    ups = [before.tensors[f"{stem}.lora_B.weight"] for stem in QKV]
    assert torch.equal(fused.tensors[f"{FUSED}.lora_up.weight"], torch.cat(ups))


def test_members_that_are_all_equal_are_fused_at_their_own_rank() -> None:
    up, down = numbers(H, 3, seed=1), numbers(3, COLUMNS, seed=2)
    before = File({f"{stem}.lora_{x}.weight": t for stem in QKV for x, t in (("B", up), ("A", down))})
    fused = converted(before, "flux1", "kohya")
    assert torch.equal(fused.tensors[f"{FUSED}.lora_up.weight"], torch.cat([up] * 3))
    assert torch.equal(fused.tensors[f"{FUSED}.lora_down.weight"], down)


def test_a_fused_weight_that_was_never_trained_stays_whole() -> None:
    before = File(
        {
            f"{FUSED}.lora_up.weight": torch.zeros(3 * H, RANK),
            f"{FUSED}.lora_down.weight": numbers(RANK, COLUMNS, seed=1),
            f"{FUSED}.alpha": torch.tensor(1.0),
        }
    )
    between = converted(before, "flux1", "diffusers")
    assert set(between.tensors) == {f"{stem}.lora_{x}.weight" for stem in QKV for x in "AB"}
    after = converted(between, "flux1", "kohya")
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)


def test_a_part_of_a_fused_weight_that_is_zero_stays_zero() -> None:
    up = numbers(3 * H, RANK, seed=1)
    up[H : 2 * H] = 0
    before = File(
        {
            f"{FUSED}.lora_up.weight": up,
            f"{FUSED}.lora_down.weight": numbers(RANK, COLUMNS, seed=2),
            f"{FUSED}.alpha": torch.tensor(1.0),
        }
    )
    between = converted(before, "flux1", "omi")
    qkv = "transformer.double_blocks.0.img_attn.qkv"
    assert {key.partition(".lora")[0] for key in between.tensors if "lora" in key} == {f"{qkv}.0", f"{qkv}.2"}
    after = converted(between, "flux1", "kohya")
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)


def test_a_member_that_was_never_trained_beside_others_that_were_is_left_out_and_named() -> None:
    before = apart(QKV, (2, 2, 2), (1, 1, 1), torch.float32)
    before.tensors[f"{QKV[1]}.lora_B.weight"].zero_()
    fused = converted(before, "flux1", "kohya")
    after = converted(fused, "flux1", "diffusers")
    kept = {f"{stem}.lora_{x}.weight" for stem in (QKV[0], QKV[2]) for x in "AB"}
    assert set(after.tensors) == kept
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in kept)


def test_a_fused_weight_whose_rows_cannot_be_shared_out_is_a_mismatch() -> None:
    before = File(
        {
            f"{FUSED}.lora_up.weight": numbers(10, 2, seed=1),
            f"{FUSED}.lora_down.weight": numbers(2, 5, seed=2),
        }
    )
    with pytest.raises(Mismatch, match="3 equal parts"):
        converted(before, "flux1", "diffusers")


def test_rows_that_xlabs_has_no_name_for_may_be_zero_and_nothing_else() -> None:
    """XLabs' adapters leave the last rows of linear1 alone."""
    stem = "single_blocks.37.processor.qkv_lora"
    before = File(
        {f"{stem}.up.weight": numbers(3 * H, 2, seed=1), f"{stem}.down.weight": numbers(2, 5, seed=2)}
    )
    between = converted(before, "flux1", "kohya")
    up = between.tensors["lora_unet_single_blocks_37_linear1.lora_up.weight"]
    assert up.shape == (7 * H, 2) and not up[3 * H :].any()
    after = converted(between, "flux1", "xlabs")
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)
    up[-1, 0] = 1e-30
    with pytest.raises(Untranslatable, match="single_blocks_37_linear1"):
        converted(between, "flux1", "xlabs")


# --- any rows at all ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Atom:
    """Rows [start, stop) of a module of `height` rows: the least that either naming moves as one."""

    module: str
    start: int
    stop: int
    height: int

    @property
    def piece(self) -> Piece:
        share = Fraction(1, self.height)
        return Piece(self.module, self.start * share, self.stop * share, self.stop - self.start)


class Chance:
    """Seeded choices."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self._generator))

    def integers(self, *shape: int) -> Tensor:
        """Small whole numbers, none of them zero: products and sums of them are exact."""
        signs = torch.randint(0, 2, shape, generator=self._generator) * 2 - 1
        return (torch.randint(1, 4, shape, generator=self._generator) * signs).double()

    def shuffled(self, items: Sequence[Atom]) -> list[Atom]:
        return [items[i] for i in torch.randperm(len(items), generator=self._generator).tolist()]


def any_naming(chance: Chance, modules: Mapping[str, int]) -> list[list[Atom]]:
    """Every module in one to three equal parts, the parts in any order in stacks of up to four."""
    atoms = []
    for module, height in modules.items():
        count = 1 + chance.below(3)
        atoms += [Atom(module, n * height // count, (n + 1) * height // count, height) for n in range(count)]
    rows, left = [], chance.shuffled(atoms)
    while left:
        size = 1 + chance.below(4)
        rows.append(left[:size])
        left = left[size:]
    return rows


def naming_of(name: str, rows: Sequence[Sequence[Atom]]) -> Naming:
    return Naming(name, tuple(Row(f"{name}{n}", _span(row), None) for n, row in enumerate(rows)), False)


def _span(row: Sequence[Atom]) -> Span:
    return tuple(atom.piece for atom in row)


def lora(chance: Chance, rows: int) -> Change:
    scale = 2.0 ** (chance.below(5) - 2)
    return deltas.build(
        "lora", {"up": chance.integers(rows, 2), "down": chance.integers(2, COLUMNS)}, scale=scale
    )


def loha(chance: Chance, rows: int) -> Change:
    roles = {f"w{n}_a": chance.integers(rows, 2) for n in (1, 2)} | {
        f"w{n}_b": chance.integers(2, COLUMNS) for n in (1, 2)
    }
    return deltas.build("loha", roles, scale=0.5)


def whole(chance: Chance, rows: int) -> Change:
    return deltas.build("diff", {"value": chance.integers(rows, COLUMNS)})


def replacement(chance: Chance, rows: int) -> Change:
    return deltas.build("set", {"value": chance.integers(rows, COLUMNS)})


def scaling(chance: Chance, rows: int) -> Change:
    roles = {"vector": chance.integers(rows), "on_input": torch.tensor(0.0)}
    return deltas.build("ia3", roles, weight_shape=(rows, COLUMNS))


def dora(chance: Chance, rows: int) -> Change:
    return deltas.Magnitude(lora(chance, rows), chance.integers(rows).abs(), "out")


def rotation(chance: Chance, rows: int) -> Change:
    return deltas.build("oft", {"blocks": chance.integers(rows // 2, 2, 2)}, weight_shape=(rows, COLUMNS))


# kind -> (how one is made, whether some rows of a stack may be left alone, how far the result may be off)
KINDS: dict[str, tuple[Callable[[Chance, int], Change], bool, float]] = {
    "lora": (lora, True, 0.0),
    "loha": (loha, True, 0.0),
    "diff": (whole, True, 0.0),
    "set": (replacement, False, 0.0),
    "ia3": (scaling, True, 0.0),
    # Square roots and inverses are not whole numbers.
    "dora": (dora, False, 1e-12),
    "oft": (rotation, True, 1e-12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_cut_and_stacked_are_the_same_rows(kind: str) -> None:
    """dense(recut) = the rows of dense(source), for any two ways to stack the rows of some modules."""
    make, may_miss, tolerance = KINDS[kind]
    for seed in range(25):
        chance = Chance(seed)
        modules = {f"m{n}": 12 * (1 + chance.below(2)) for n in range(1 + chance.below(5))}
        bases = {module: chance.integers(height, COLUMNS) for module, height in modules.items()}
        ours, theirs = any_naming(chance, modules), any_naming(chance, modules)
        sources, expected = [], {module: torch.zeros_like(base) for module, base in bases.items()}
        for row in ours:
            if may_miss and chance.below(4) == 0:
                continue
            change = make(chance, sum(atom.stop - atom.start for atom in row))
            sources.append(Source(Place("c", _span(row), "weight"), change))
            for atom, part in _parts(row, change.dense(_base(row, bases), torch.float64)):
                expected[atom.module][atom.start : atom.stop] = part
        found = recut(sources, naming_of("b", theirs))
        assert not found.nameless
        actual = {module: torch.zeros_like(base) for module, base in bases.items()}
        for cut in found.cuts:
            row = theirs[int(cut.row.native.removeprefix("b"))]
            made = cut.make()
            if made is not None:
                for atom, part in _parts(row, made.dense(_base(row, bases), torch.float64)):
                    actual[atom.module][atom.start : atom.stop] = part
        for module in modules:
            assert float((actual[module] - expected[module]).abs().max()) <= tolerance, (seed, module)


def _base(row: Sequence[Atom], bases: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([bases[atom.module][atom.start : atom.stop] for atom in row])


def _parts(row: Sequence[Atom], delta: Tensor) -> Iterator[tuple[Atom, Tensor]]:
    sizes = [atom.stop - atom.start for atom in row]
    yield from zip(row, delta.split(sizes), strict=True)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_rows_are_renamed_and_nothing_is_touched(seed: int) -> None:
    chance = Chance(seed)
    rows = any_naming(chance, {"m0": 12, "m1": 24, "m2": 12})
    sources = [
        Source(Place("c", _span(row), "weight"), lora(chance, sum(a.stop - a.start for a in row)))
        for row in rows
    ]
    found = recut(sources, naming_of("b", rows))
    assert [cut.renames for cut in found.cuts] == [True] * len(rows)
    assert all(cut.make() is source.change for cut, source in zip(found.cuts, sources, strict=True))


def test_what_is_expanded_while_planning_is_not_kept() -> None:
    factors = (torch.ones(6, 2), torch.ones(2, 5))
    source = Source(
        Place("c", (Piece("m"),), "weight"), deltas.Hadamard(*factors, *factors), Preparation(expand=True)
    )
    (cut,) = recut([source], Naming("b", (Row("b", (Piece("m"),), None),), False)).cuts
    made = cut.make()
    assert isinstance(made, deltas.LowRank)
    held = weakref.ref(made)
    del made
    assert held() is None


def test_a_transposed_row_takes_the_transposed_change() -> None:
    chance = Chance(0)
    change = lora(chance, 6)
    source = Source(Place("c", (Piece("m"),), "weight"), change)
    row = Row("b", (Piece("m", transposed=True),), None)
    made = recut([source], Naming("b", (row,), False)).cuts[0].make()
    assert made is not None
    assert torch.equal(made.dense(dtype=torch.float64), change.dense(dtype=torch.float64).T)
