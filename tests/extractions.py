"""What tests of `extract` hold its results to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from checkpoints import Tensors

from adapterkit import Adapter, Extraction


def deltas(adapter: Adapter) -> Tensors:
    """Every change of one module as a matrix or kernel, by its canonical name."""
    found = {}
    for place, changes in adapter.changes.items():
        assert len(place.span) == 1 and len(changes) == 1
        name = place.span[0].module
        found[f"{name}.{place.param}" if place.param else name] = changes[0].dense()
    return found


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.reshape(wanted.shape).double() - wanted.double()).norm() / wanted.double().norm())


def assert_recovered(adapter: Adapter, wanted: Mapping[str, torch.Tensor], tolerance: float) -> None:
    found = deltas(adapter)
    assert found.keys() == wanted.keys()
    assert max(error(found[name], wanted[name]) for name in wanted) < tolerance


def everything_moves(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {
        k: t + 0.01 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
        for k, t in tensors.items()
    }


def assert_balances(done: Extraction, tuned: Mapping[str, torch.Tensor]) -> None:
    assert list(done.tensors) == list(tuned)
    receipt = done.plan.receipt
    assert receipt.balances and receipt.total == len(tuned)
    assert receipt.mapped == sum(what in ("extracted", "whole") for what in done.tensors.values())
    left = math.fsum(done.left.values())
    assert left + done.kept * done.energy == pytest.approx(done.energy)
