"""Sums of what several adapters change at one place, and their inner products, against the dense deltas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from adapterkit import MergeOptions, RankRule, merge
from adapterkit.deltas import Change, ExpertsLowRank, LowRank, Whole
from adapterkit.errors import Mismatch
from adapterkit.merging.inputs import Contribution
from adapterkit.merging.interference import inner_products
from adapterkit.merging.stacks import Stack
from adapterkit.merging.sums import summed
from adapterkit.merging.tasks import Task, task_of


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


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_task_is_the_delta_of_all_that_changes_the_weight(shape: tuple[int, int]) -> None:
    whole = Whole(numbers(*shape, seed=1), scale=-0.5)
    lora = LowRank(numbers(shape[0], 2, seed=2), numbers(2, shape[1], seed=3), 1.5)
    for changes in ((whole,), (lora,), (whole, lora)):
        task = task_of("adapter", changes, 0.8)
        expected = sum((dense(change) for change in changes), torch.zeros(shape, dtype=torch.float64))
        torch.testing.assert_close(task.dense().double(), expected, rtol=1e-5, atol=1e-5)
        up, down = task.factors()
        torch.testing.assert_close(up @ down, expected, rtol=1e-5, atol=1e-5)


MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def file_of(rank: int, alpha: float, seed: int) -> dict[str, Tensor]:
    up, down = numbers(320, rank, seed=seed), numbers(rank, 320, seed=seed + 10)
    names = (f"{MODULE}.lora_up.weight", f"{MODULE}.lora_down.weight", f"{MODULE}.alpha")
    return dict(zip(names, (up, down, torch.tensor(alpha)), strict=True))


def delta_of(file: dict[str, Tensor]) -> Tensor:
    up, down, alpha = (tensor.double() for tensor in file.values())
    return up @ down * alpha / down.shape[0]


def test_without_a_rule_the_largest_of_different_ranks_is_kept() -> None:
    files = [file_of(2, 2.0, 1), file_of(5, 5.0, 2)]
    done = merge(files, options=MergeOptions(method="svd"))
    assert done.reduction is not None and set(done.reduction.ranks.values()) == {5}


@pytest.mark.parametrize("rank", [2, 40, 100])
def test_of_a_sum_with_many_ranks_for_its_weight_the_best_ones_are_kept_at_the_strengths(rank: int) -> None:
    """Where few of many ranks are wanted the sum is multiplied out, which is quicker, and the same."""
    files, strengths = [file_of(80, 40.0, 1), file_of(80, 20.0, 2)], (0.8, -0.3)
    matrix = sum((s * delta_of(one) for s, one in zip(strengths, files, strict=True)), torch.zeros(()))
    done = merge(files, strengths, rule=RankRule(rank=rank))
    ((change,),) = done.plan.adapter.changes.values()
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    least = float(np.sqrt((values[rank:] ** 2).sum()))
    assert float((dense(change) - matrix).norm()) <= least * 1.001
