"""resize with the base model: errors relative to its weights, and DoRA in the weight that it makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from adapters import build, family, small_models
from test_resize import modules
from torch import Tensor

from adapterkit.adapter import Adapter
from adapterkit.deltas import Magnitude
from adapterkit.errors import Mismatch, Refused
from adapterkit.operations.resize import ResizeOptions, resizable, resize
from adapterkit.ranks import RankRule

NETWORK = "unet_sd1"


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_models():
        yield


def base_for(adapter: Adapter, seed: int = 5) -> dict[str, Tensor]:
    """A model of the family in its own names, all of its main network, in sizes that real weights have."""
    generator = torch.Generator().manual_seed(seed)
    network = family("sd1")[0].network("unet")
    assert network is not None
    return {
        name: torch.randn(shape, generator=generator) * (0.02 if index % 2 else 0.2)
        for index, (name, shape) in enumerate(network.shapes.items())
    }


def unet(form: str, **options: object) -> Adapter:
    found = [module for module in modules(form, most=6) if module.component == "unet"]
    return build("sd1", "kohya", found, scale=0.5, **options).read("sd1")  # type: ignore[arg-type]


def weight_of(base: dict[str, Tensor], place: object) -> Tensor:
    return base[f"{place.span[0].module}.weight"]  # type: ignore[attr-defined]


def test_with_the_base_ranks_go_where_they_are_large_beside_its_weights() -> None:
    adapter = unet("lora")
    base = base_for(adapter)
    ready = resizable(adapter, ResizeOptions(base=base, family="sd1"))
    for place, part in ready.found.parts.items():
        square = float(weight_of(base, place).double().square().sum())
        assert part.weight == pytest.approx(1 / square)
    size = resize(adapter, rule=RankRule(rank=2)).reduction.size
    plain, weighted = (resize(adapter, rule=RankRule(size=size), options=o) for o in (None, ready.options))
    assert weighted.reduction.ranks != plain.reduction.ranks

    def relative(resized: object) -> float:
        return sum(
            part.left_out(resized.reduction.ranks[place]) / float(weight_of(base, place).square().sum())  # type: ignore[attr-defined]
            for place, part in resized.reduction.parts.items()  # type: ignore[attr-defined]
        )

    assert relative(weighted) < relative(plain)


def test_an_error_is_then_relative_to_the_weights() -> None:
    adapter = unet("lora")
    resized = resize(adapter, rule=RankRule(error=0.3), options=ResizeOptions(base=base_for(adapter)))
    assert resized.reduction.weighted_error <= 0.3 * (1 + 1e-9)


def effective(change: Magnitude, base: Tensor) -> Tensor:
    """W' by the definition, row by row or column by column."""
    moved = base.double() + change.inner.dense(dtype=torch.float64).reshape(base.shape)
    axis = 0 if change.axis == "out" else 1
    others = [other for other in range(base.ndim) if other != axis]
    sides = [-1 if at == axis else 1 for at in range(base.ndim)]
    return (
        moved
        / torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        * change.vector.double().reshape(sides)
    )


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


DORA = [
    "dora of rows",
    "dora of columns",
    "dora of rows over loha",
    "dora of columns over lokr",
]


@pytest.mark.parametrize("form", DORA)
def test_a_resized_dora_is_nearer_than_truncated_factors_with_the_old_magnitudes(form: str) -> None:
    adapter = unet(form)
    base = base_for(adapter)
    resized = resize(adapter, rule=RankRule(rank=2), options=ResizeOptions(base=base))
    ours = plain = 0.0
    for place, (change,) in adapter.changes.items():
        assert isinstance(change, Magnitude)
        weight = weight_of(base, place)
        (made,) = resized.plan.adapter.changes[place]
        assert isinstance(made, Magnitude) and made.axis == change.axis
        before, after = effective(change, weight), effective(made, weight)
        ours += float((before - after).square().sum())
        cut = best(change.inner.dense(dtype=torch.float64).reshape(weight.shape[0], -1), 2)
        moved = weight.double() + cut.reshape(weight.shape)
        axis = 0 if change.axis == "out" else 1
        others = [other for other in range(weight.ndim) if other != axis]
        sides = [-1 if at == axis else 1 for at in range(weight.ndim)]
        naive = (
            moved
            / torch.linalg.vector_norm(moved, dim=others, keepdim=True)
            * change.vector.double().reshape(sides)
        )
        plain += float((before - naive).square().sum())
    assert ours < plain


@pytest.mark.parametrize("form", DORA[:2])
def test_the_new_magnitudes_are_the_least_squares_fit(form: str) -> None:
    adapter = unet(form)
    base = base_for(adapter)
    resized = resize(adapter, rule=RankRule(rank=2), options=ResizeOptions(base=base))
    for place, (change,) in adapter.changes.items():
        weight = weight_of(base, place)
        (made,) = resized.plan.adapter.changes[place]
        assert isinstance(change, Magnitude) and isinstance(made, Magnitude)
        before, after = effective(change, weight), effective(made, weight)
        others = [other for other in range(weight.ndim) if other != (0 if change.axis == "out" else 1)]
        # What is left is at right angles to each row, or column, so that no other length is nearer.
        left = ((before - after) * after).sum(dim=others)
        assert float(left.abs().max()) < 1e-5 * float(before.square().sum(dim=others).max())


def test_a_dora_of_full_rank_stays_bit_for_bit() -> None:
    adapter = unet("dora of rows")
    resized = resize(adapter, rule=RankRule(rank=4), options=ResizeOptions(base=base_for(adapter)))
    for place, changes in adapter.changes.items():
        assert resized.plan.adapter.changes[place] == changes


def test_without_a_base_dora_is_refused() -> None:
    with pytest.raises(Refused) as caught:
        resize(unet("dora of rows"), rule=RankRule(rank=2))
    assert caught.value.code == "base-needed" and "--base" in caught.value.hint


def test_the_measured_error_of_a_dora_is_that_of_the_weights(tmp_path) -> None:
    adapter = unet("dora of rows")
    base = base_for(adapter)
    done = resize(adapter, tmp_path / "x.safetensors", RankRule(rank=2), ResizeOptions(base=base))
    left = whole = 0.0
    for place, (change,) in adapter.changes.items():
        weight = weight_of(base, place)
        (made,) = done.plan.adapter.changes[place]
        assert isinstance(change, Magnitude) and isinstance(made, Magnitude)
        before = effective(change, weight)
        left += float((before - effective(made, weight)).square().sum())
        whole += float((before - weight).square().sum())
    assert done.measured == pytest.approx((left / whole) ** 0.5, rel=1e-4)


def test_a_base_that_lacks_a_weight_is_refused() -> None:
    adapter = unet("lora")
    base = base_for(adapter)
    gone = f"{next(iter(adapter.changes)).span[0].module}.weight"
    with pytest.raises(Mismatch) as caught:
        resize(
            adapter,
            rule=RankRule(rank=2),
            options=ResizeOptions(base={k: t for k, t in base.items() if k != gone}),
        )
    assert caught.value.code == "base-lacks"


def test_a_base_of_another_width_is_refused() -> None:
    adapter = unet("lora")
    base = base_for(adapter)
    name = f"{next(iter(adapter.changes)).span[0].module}.weight"
    base[name] = torch.zeros(base[name].shape[0] + 1, *base[name].shape[1:])
    with pytest.raises(Mismatch):
        resize(adapter, rule=RankRule(rank=2), options=ResizeOptions(base=base))
