"""Sums of what several adapters change at one place, and their inner products, against the dense deltas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from adapterkit import RankRule, merge
from adapterkit.deltas import Change, ExpertsLowRank
from adapterkit.errors import Mismatch
from adapterkit.merging.inputs import Contribution
from adapterkit.merging.interference import inner_products
from adapterkit.merging.stacks import Stack
from adapterkit.merging.sums import summed
from adapterkit.merging.tasks import Task


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts(rank: int, scale: float, seed: int, count: int = 3) -> ExpertsLowRank:
    up, down = numbers(7, rank * count, seed=seed), numbers(count * rank, 5, seed=seed + 100)
    return ExpertsLowRank(up, down, scale, count)


def contributed(*changes: Change, strengths: Sequence[float]) -> list[Contribution]:
    return [
        Contribution(f"adapter {index}", "module", (change,), strength)
        for index, (change, strength) in enumerate(zip(changes, strengths, strict=True))
    ]


def dense(change: Change) -> Tensor:
    return change.dense(dtype=torch.float64)


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.8, -0.3), (-2.0, 0.5)])
def test_experts_are_added_expert_by_expert(strengths: tuple[float, float]) -> None:
    one, two = experts(2, 0.75, 1), experts(4, -1.5, 2)
    (made,) = summed(contributed(one, two, strengths=strengths))
    assert isinstance(made, ExpertsLowRank)
    assert (made.rank, made.count, made.scale) == (6, 3, 1.0)
    expected = strengths[0] * dense(one) + strengths[1] * dense(two)
    torch.testing.assert_close(dense(made), expected, rtol=1e-5, atol=1e-5)


def test_other_numbers_of_experts_are_refused_by_name() -> None:
    with pytest.raises(Mismatch, match="adapter 0"):
        summed(contributed(experts(2, 1.0, 1), experts(2, 1.0, 2, count=4), strengths=(1.0, 1.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_products_of_a_stack_are_those_of_the_deltas_without_their_strengths(
    dtype: torch.dtype,
) -> None:
    tasks = [
        Task(f"{rank}", numbers(12, rank, seed=rank), numbers(rank, 9, seed=rank + 50), scale, strength)
        for rank, scale, strength in ((2, 0.5, 0.8), (5, -1.5, -0.3), (3, 2.0, 3.0))
    ]
    deltas = torch.stack([(task.up.double() @ task.down.double() * task.scale).flatten() for task in tasks])
    expected = deltas @ deltas.T
    for found in (Stack(tasks, dtype).inner_products(), inner_products(tasks)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 40, 100])
def test_of_a_sum_with_many_ranks_for_its_weight_the_best_ones_are_kept_at_the_strengths(rank: int) -> None:
    """Where few of many ranks are wanted the sum is multiplied out, which is quicker, and the same."""
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    strengths, matrix, files = (0.8, -0.3), torch.zeros(320, 320, dtype=torch.float64), []
    for seed, strength in enumerate(strengths):
        up, down = numbers(320, 80, seed=seed), numbers(80, 320, seed=seed + 10)
        # Alpha is half the rank.
        matrix += strength * 0.5 * (up.double() @ down.double())
        names = (f"{module}.lora_up.weight", f"{module}.lora_down.weight", f"{module}.alpha")
        files.append(dict(zip(names, (up, down, torch.tensor(40.0)), strict=True)))
    done = merge(files, strengths, rule=RankRule(rank=rank))
    ((change,),) = done.plan.adapter.changes.values()
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    least = float(np.sqrt((values[rank:] ** 2).sum()))
    assert float((dense(change) - matrix).norm()) <= least * 1.001
