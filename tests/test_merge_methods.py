"""Every method of merging against its paper, written out on whole float64 matrices with NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import merging_papers as paper
import numpy as np
import pytest
import torch

from adapterkit.cli import merge as command
from adapterkit.errors import Refused, UsageError
from adapterkit.linalg.product_svd import gram, product_svd, truncated_svd
from adapterkit.merging import METHODS, Settings
from adapterkit.merging.elementwise import combined
from adapterkit.merging.interference import Meeting, inner_products
from adapterkit.merging.spectral import core, isotropic, knots, scaled, tsv
from adapterkit.merging.tasks import Task

Array = np.ndarray


def make(*ranks: int, shape: tuple[int, int] = (24, 18), strengths: Sequence[float] = (0.8, -0.3, 0.5)):
    """Tasks of random factors; scale and strength are no powers of two."""
    generator = torch.Generator().manual_seed(sum(ranks) + shape[0])
    return [
        Task(
            f"adapter {index}",
            torch.randn(shape[0], rank, generator=generator),
            torch.randn(rank, shape[1], generator=generator),
            0.3 + index,
            strengths[index],
        )
        for index, rank in enumerate(ranks)
    ]


def delta(task: Task) -> Array:
    return (task.up.double() @ task.down.double()).numpy() * task.scale


def whole(tasks) -> tuple[list[Array], list[float]]:
    return [delta(task) for task in tasks], [task.strength for task in tasks]


def dense(found) -> Array:
    up, down = found.factors(found.rank)
    return (up.double() @ down.double()).numpy()


def close(ours: Array, theirs: Array, tolerance: float = 2e-6) -> None:
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


# --- against them ---------------------------------------------------------------------------------

RANKS = [(4,), (4, 4), (2, 5), (3, 3, 3), (1, 2, 6)]
SHAPES = [(24, 18), (18, 40)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_is_the_papers(ranks, shape, density) -> None:
    tasks = make(*ranks, shape=shape)
    weights = [task.strength for task in tasks]
    values = [delta(task) for task in tasks]
    ours = combined(
        [torch.from_numpy(v) for v in values], weights, ["x"] * len(tasks), "k", "ties", Settings(density)
    )
    close(ours.numpy(), paper.ties(values, weights, density), 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_knots_in_factored_form_is_that_of_the_whole_deltas(ranks, shape) -> None:
    tasks = make(*ranks, shape=shape)
    close(dense(knots(tasks, Settings(0.4), "k")), paper.knots(*whole(tasks), 0.4))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [*RANKS, (12, 12, 12)])
def test_tsv_in_factored_form_is_that_of_the_whole_deltas(ranks, shape) -> None:
    tasks = make(*ranks, shape=shape)
    close(dense(tsv(tasks, Settings(), "k")), paper.tsv(*whole(tasks)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_core_space_in_factored_form_is_that_of_the_whole_deltas(ranks, shape) -> None:
    tasks = make(*ranks, shape=shape)
    close(dense(core(tasks, Settings(0.4), "k")), paper.core(*whole(tasks), 0.4))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", RANKS)
def test_iso_c_is_the_papers_with_the_mean_over_values_that_are_not_zero(ranks, shape) -> None:
    tasks = make(*ranks, shape=shape)
    up = torch.cat([task.up.double() * task.scale * task.strength for task in tasks], dim=1)
    found = isotropic(product_svd(up, torch.cat([task.down for task in tasks])))
    close(dense(found), paper.iso(*whole(tasks)))


def test_iso_c_counts_no_direction_that_is_not_there() -> None:
    (one,) = make(4)
    up, down = one.up.double(), one.down.double()
    once, twice = product_svd(up, down), product_svd(torch.cat([up, up], 1), torch.cat([down, down]))
    assert twice.rank == 8
    found = isotropic(twice)
    assert found.values.tolist() == pytest.approx([2 * float(once.values.mean())] * 4, rel=1e-9)
    close(dense(found), 2 * dense(isotropic(once)))


@pytest.mark.parametrize("strength", [1.0, 0.3, 2.0])
def test_a_decomposition_at_a_strength_is_that_of_the_whole_at_it(strength: float) -> None:
    (one,) = make(4)
    found = scaled(product_svd(one.up, one.down), strength)
    matrix = strength * (one.up.double() @ one.down.double()).numpy()
    close(dense(found), matrix)
    assert found.energy == pytest.approx(np.linalg.norm(matrix) ** 2, rel=1e-6)
    assert found.left_out(4) == pytest.approx(0.0, abs=1e-9 * found.energy)
    assert found.error(0) == 1.0


FACTORED: dict[str, Callable] = {"knots": knots, "tsv": tsv, "core": core}


@pytest.mark.parametrize("name", FACTORED)
def test_how_a_delta_is_divided_between_its_factors_does_not_matter(name) -> None:
    """The gauge: up / c and down · c, or any other basis of the ranks between, are the same adapter."""
    tasks = make(4, 3)
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first = tasks[0]
    up, down = first.up.double() @ mix * 1e3, torch.linalg.solve(mix, first.down.double()) / 1e3
    other = [Task(first.name, up, down, first.scale, first.strength), tasks[1]]
    merge = FACTORED[name]
    close(dense(merge(other, Settings(), "k")), dense(merge(tasks, Settings(), "k")), 1e-5)


@pytest.mark.parametrize("name", FACTORED)
def test_the_order_of_the_adapters_does_not_matter(name) -> None:
    tasks = make(4, 3, 2)
    merge, settings = FACTORED[name], Settings(0.5, inner="dare-ties", seed=7)
    close(dense(merge(tasks[::-1], settings, "k")), dense(merge(tasks, settings, "k")), 1e-5)


@pytest.mark.parametrize("name", FACTORED)
def test_an_adapter_that_changes_nothing_and_one_that_is_there_twice_do_no_harm(name) -> None:
    """Zero and dependent directions have no vectors of their own; nothing is made of their rounding."""
    one, other = make(4, 3)
    zero = Task("zero", other.up * 0, other.down, 1.0, 1.0)
    settings = Settings(1.0)
    merge = FACTORED[name]
    close(dense(merge([one, zero], settings, "k")), dense(merge([one], settings, "k")), 1e-5)
    again = Task("again", one.up, one.down, one.scale, one.strength)
    noisy = Task("again", one.up.double() * (1 + 1e-15), one.down, one.scale, one.strength)
    twice = dense(merge([one, again], settings, "k"))
    close(dense(merge([one, noisy], settings, "k")), twice, 1e-5)
    # Both methods of means give the adapter itself back; TSV shares its directions out.
    close(twice, dense(merge([one], settings, "k")), 1e-5)


def test_tsv_keeps_tasks_in_directions_of_their_own_as_they_are() -> None:
    """Where nothing interferes, its result is the plain sum."""
    q = torch.linalg.qr(torch.randn(24, 8, generator=torch.Generator().manual_seed(1))).Q
    p = torch.linalg.qr(torch.randn(18, 8, generator=torch.Generator().manual_seed(2))).Q
    tasks = [Task("a", q[:, :4], p[:, :4].T, 2.0, 0.7), Task("b", q[:, 4:], p[:, 4:].T, 1.0, -0.4)]
    close(dense(tsv(tasks, Settings(), "k")), sum(t.strength * delta(t) for t in tasks))


# --- what DARE drops ------------------------------------------------------------------------------


def dare(values, name="a", key="k", seed=0, density=0.3):
    return combined([values], [1.0], [name], key, "dare", Settings(density, seed=seed))


def test_dare_keeps_its_share_and_divides_by_it() -> None:
    values = torch.randn(200, 100, dtype=torch.float64)
    found = dare(values)
    kept = found != 0
    assert abs(float(kept.double().mean()) - 0.3) < 0.02
    assert torch.allclose(found[kept], values[kept] / 0.3)


def test_the_mean_of_dare_over_seeds_is_the_delta() -> None:
    values = torch.randn(10, 10, dtype=torch.float64)
    mean = torch.stack([dare(values, seed=seed) for seed in range(3000)]).mean(dim=0)
    assert float((mean - values).norm() / values.norm()) < 0.05


def test_what_dare_drops_depends_on_seed_adapter_and_module_and_on_nothing_else() -> None:
    values = torch.randn(30, 30)
    assert torch.equal(dare(values), dare(values))
    others = [dare(values, name="b"), dare(values, key="other"), dare(values, seed=1)]
    assert all(not torch.equal(dare(values), other) for other in others)
    settings = Settings(0.3)
    pair = combined([values, -2 * values], [1.0, 0.5], ["a", "b"], "k", "dare", settings)
    swapped = combined([-2 * values, values], [0.5, 1.0], ["b", "a"], "k", "dare", settings)
    assert torch.allclose(pair, swapped) and torch.allclose(pair, dare(values) - dare(values, name="b"))


def test_dare_ties_elects_among_what_dare_kept() -> None:
    values = [torch.randn(20, 20, dtype=torch.float64) for _ in range(2)]
    found = combined(values, [1.0, 2.0], ["a", "b"], "k", "dare-ties", Settings(0.5))
    kept = [dare(v, name, density=0.5).numpy() for v, name in zip(values, "ab", strict=True)]
    close(found.numpy(), paper.elect([kept[0], 2 * kept[1]], [1.0, 2.0]), 1e-12)


def test_magnitude_pruning_is_the_sum_of_the_largest() -> None:
    values = [torch.randn(20, 20, dtype=torch.float64) for _ in range(2)]
    found = combined(values, [1.0, -2.0], ["a", "b"], "k", "magnitude", Settings(0.25))
    close(found.numpy(), paper.trim(values[0].numpy(), 0.25) - 2 * paper.trim(values[1].numpy(), 0.25), 1e-12)


# --- the ways to divide ---------------------------------------------------------------------------


def ties(values, strengths, divide):
    return combined(
        [torch.tensor(v) for v in values],
        strengths,
        ["a", "b"][: len(values)],
        "k",
        "ties",
        Settings(1.0, divide),
    )


def test_agreeing_numbers_are_averaged_by_strength_by_count_or_added() -> None:
    values, strengths = [[1.0, -1.0], [3.0, 4.0]], [3.0, 1.0]
    assert ties(values, strengths, "strengths").tolist() == [6.0 / 4, 4.0]
    assert ties(values, strengths, "count").tolist() == [6.0 / 2, 4.0]
    assert ties(values, strengths, "nothing").tolist() == [6.0, 4.0]


def test_a_negative_strength_takes_an_adapter_away_and_never_turns_its_sign_back() -> None:
    """Dividing by the sum of signed strengths would."""
    assert ties([[2.0]], [-0.5], "strengths").tolist() == [-2.0]
    assert ties([[1.0], [2.0]], [1.0, -1.0], "strengths").tolist() == [-2.0]


def test_where_signs_are_in_balance_nobody_wins() -> None:
    assert ties([[1.0, 2.0], [1.0, 2.0]], [1.0, -1.0], "strengths").tolist() == [0.0, 0.0]


# --- settings, names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"density": 0.0}, {"density": 1.5}, {"strength": 0.0}, {"divide": "all"}, {"inner": "svd"}]
)
def test_settings_that_make_no_sense_are_refused(wrong) -> None:
    with pytest.raises(UsageError) as caught:
        Settings(**wrong)
    assert caught.value.code == "merge-setting" and caught.value.hint


def test_the_command_line_has_every_method() -> None:
    assert tuple(METHODS) == command.METHODS


# --- how adapters meet ----------------------------------------------------------------------------


def test_inner_products_through_the_factors_are_those_of_the_deltas() -> None:
    tasks = make(4, 3, 2)
    flat = np.stack([delta(task).ravel() for task in tasks])
    close(inner_products(tasks).numpy(), flat @ flat.T, 1e-5)


def test_cosines_and_what_the_sum_keeps_are_those_of_the_deltas() -> None:
    tasks, others = make(4, 3), make(2, 5, shape=(18, 40))
    meeting = Meeting(["adapter 0", "adapter 1"])
    for block, several in (("A", tasks), ("B", others), ("B", others[:1])):
        meeting.add(block, several, inner_products(several))
    found = meeting.result()
    first = np.concatenate([delta(tasks[0]).ravel(), delta(others[0]).ravel(), delta(others[0]).ravel()])
    second = np.concatenate([delta(tasks[1]).ravel(), delta(others[1]).ravel(), 0 * delta(others[0]).ravel()])
    assert found.norms() == pytest.approx([np.linalg.norm(first), np.linalg.norm(second)], rel=1e-5)
    assert found.cosine(0, 1) == pytest.approx(
        first @ second / np.linalg.norm(first) / np.linalg.norm(second), abs=1e-5
    )
    apart = 0.64 * first @ first + 0.09 * second @ second
    total = 0.8 * first - 0.3 * second
    assert found.kept() == pytest.approx(total @ total / apart, rel=1e-5)
    assert found.blocks == ("A", "B")


# --- truncating a sum of many ranks in float32 -----------------------------------------------------


def stacked(*ranks: int, fall: float = 0.6, shape: tuple[int, int] = (96, 80)):
    """Factors of several adapters side by side, whose columns fall, in float32."""
    generator = torch.Generator().manual_seed(len(ranks))
    ups = [
        torch.randn(shape[0], rank, generator=generator) * torch.arange(1, rank + 1) ** -fall
        for rank in ranks
    ]
    up = torch.cat(ups, dim=1)
    return up, torch.randn(up.shape[1], shape[1], generator=generator)


@pytest.mark.parametrize("most", [4, 8, 16])
@pytest.mark.parametrize("ranks", [(16, 16), (12, 8, 20), (20, 20, 20)])
@pytest.mark.parametrize("balance", [1.0, 1e-3, 1e4])
def test_truncation_in_float32_leaves_out_no_more_than_it_must(ranks, most, balance) -> None:
    up, down = stacked(*ranks)
    up, down = up * balance, down / balance
    found = truncated_svd(up, down, most, (gram(up), gram(down.T)))
    assert found is not None
    whole = up.double() @ down.double()
    values = np.linalg.svd(whole.numpy(), compute_uv=False)
    least = np.sqrt((values[most:] ** 2).sum())
    u, v = found.factors(most)
    left = float((whole - u.double() @ v.double()).norm())
    assert left <= least * (1 + 1e-6)
    assert found.error(most) == pytest.approx(least / np.linalg.norm(values), rel=1e-5)
    assert found.values.numpy() == pytest.approx(values[:most], rel=1e-4)


def test_where_little_is_left_out_float32_is_not_trusted() -> None:
    up, down = stacked(16, fall=3.0)
    both = torch.cat([up, up], dim=1), torch.cat([down, down])
    assert truncated_svd(*both, 16, (gram(both[0]), gram(both[1].T))) is None
    nearly = torch.cat([up, -up * (1 - 1e-3)], dim=1), torch.cat([down, down])
    assert truncated_svd(*nearly, 8, (gram(nearly[0]), gram(nearly[1].T))) is None
    # Here Gram matrices do tell, but of what is left out float32 sees next to nothing.
    assert truncated_svd(up, down, 8, (gram(up), gram(down.T))) is None


def test_ranks_that_add_nothing_and_numbers_that_are_none() -> None:
    up, down = stacked(16, 16)
    up[:, 3] = 0
    found = truncated_svd(up, down, 8, (gram(up), gram(down.T)))
    values = np.linalg.svd((up.double() @ down.double()).numpy(), compute_uv=False)
    assert found.values.numpy() == pytest.approx(values[:8], rel=1e-4)
    up[0, 0] = float("nan")
    with pytest.raises(Refused):
        truncated_svd(up, down, 8, (gram(up), gram(down.T)))
