"""The error of a written adapter over all modules together, against dense deltas in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from adapters import FORMS, File, build, small_models
from test_resize import file_of, modules
from torch import Tensor

from adapterkit.adapter import Adapter
from adapterkit.proof import total_error


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_models():
        yield


def dense(adapter: Adapter) -> Tensor:
    """All deltas, one behind the other."""
    return torch.cat(
        [
            sum(change.dense(dtype=torch.float64).flatten() for change in changes)  # type: ignore[misc]
            for _, changes in sorted(adapter.changes.items(), key=lambda item: str(item[0]))
        ]
    )


def without(adapter: Adapter, count: int = 1) -> Adapter:
    return replace(adapter, changes=dict(list(adapter.changes.items())[count:]))


@pytest.mark.parametrize("form", ["lora", "lora with biases", "lora, core", "loha", "lokr", "diff"])
def test_it_is_that_of_the_dense_deltas(form: str) -> None:
    one, two = (file_of(form, seed=seed).read("sd1") for seed in (0, 1))
    expected = float((dense(one) - dense(two)).norm() / dense(one).norm())
    assert total_error(one, two) == pytest.approx(expected, rel=1e-6)


def test_kinds_may_differ() -> None:
    found = modules("lora, core")
    one = build("sd1", "kohya", found).read("sd1")
    two = build("sd1", "kohya", [replace(module, form="diff") for module in found], seed=3).read("sd1")
    expected = float((dense(one) - dense(two)).norm() / dense(one).norm())
    assert total_error(one, two) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", list(FORMS))
def test_of_what_is_the_same_it_is_nothing(form: str) -> None:
    file = file_of(form)
    error = total_error(file.read("sd1"), file.read("sd1"))
    assert not error


def test_a_tiny_error_is_not_lost_in_rounding() -> None:
    file = file_of("lora")
    key = next(key for key in file.tensors if key.endswith("lora_up.weight"))
    moved = File({**file.tensors, key: file.tensors[key].double() * (1 + 1e-5)}, file.metadata)
    one, two = file.read("sd1"), moved.read("sd1")
    expected = float((dense(one) - dense(two)).norm() / dense(one).norm())
    assert total_error(one, two) == pytest.approx(expected, rel=1e-2)


def test_a_module_that_is_missing_is_all_lost() -> None:
    adapter = file_of("lora").read("sd1")
    gone = next(iter(adapter.changes.values()))[0].dense(dtype=torch.float64)
    expected = float(gone.norm() / dense(adapter).norm())
    assert total_error(adapter, without(adapter)) == pytest.approx(expected, rel=1e-6)


def test_a_module_that_was_not_asked_for_counts() -> None:
    adapter = file_of("lora").read("sd1")
    extra = next(iter(adapter.changes.values()))[0].dense(dtype=torch.float64)
    expected = float(extra.norm() / dense(without(adapter)).norm())
    assert total_error(without(adapter), adapter) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["oft", "dora of rows", "replacement"])
def test_what_depends_on_the_base_is_infinitely_wrong_where_it_differs(form: str) -> None:
    one, two = (file_of(form, seed=seed).read("sd1") for seed in (0, 1))
    assert total_error(one, two) == math.inf
    assert total_error(one, without(one)) == math.inf


def test_numbers_that_are_not_finite_on_one_side_only_are_infinitely_wrong() -> None:
    file = file_of("lora")
    key = next(key for key in file.tensors if key.endswith("lora_up.weight"))
    broken = File({**file.tensors, key: torch.full_like(file.tensors[key], math.nan)}, file.metadata)
    one, two = file.read("sd1"), broken.read("sd1")
    assert total_error(one, two) == math.inf
    assert total_error(two, one) == math.inf
    assert total_error(two, two) == 0.0


def test_a_sample_is_spread_over_the_modules() -> None:
    one, two = (file_of("lora", seed=seed).read("sd1") for seed in (0, 1))
    whole, part = total_error(one, two), total_error(one, two, sample=3)
    assert whole is not None and part is not None and part != whole and part < 10 * whole
