"""Every kind of change with seeded numbers, and its delta from the definition, in numpy alone.

What is computed here is held against the project's own mathematics, so nothing of that is used. The
definitions are those of the papers, in the conventions of LyCORIS (`lycoris/functional`) and PEFT
(`peft/tuners/*/layer.py`), written out plainly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Stored = NDArray[np.generic]


@dataclass
class Numbers:
    """Seeded normal numbers, as they are after rounding to the dtype in which they are stored."""

    seed: int
    dtype: str = "float16"

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng(self.seed)

    def __call__(self, *shape: int, around: float = 0.0, spread: float = 0.3) -> Array:
        drawn = self._generator.standard_normal(shape) * spread + around
        rounded: Array = drawn.astype(self.dtype).astype(np.float64)
        return rounded


@dataclass(frozen=True)
class Made:
    """A change of one weight. tensors: by role.  exact: those that are stored in a dtype of their own.

    delta: of the weight; not known: only its shape is.  bias: the delta of the layer's bias.
    rank: of the factors, None where they have none, so that no alpha applies.
    """

    tensors: dict[str, Array]
    delta: Array
    rank: int | None = None
    bias: Array | None = None
    exact: Mapping[str, Stored] = field(default_factory=dict)
    known: bool = True


def base(*shape: int) -> Array:
    """The weight that is changed: the same numbers for any weight of a shape."""
    numbers: Array = np.sin(np.arange(1.0, math.prod(shape) + 1.0)).reshape(shape)
    return numbers


def probe(*shape: int) -> Array:
    """Multiplied with a delta, number by number, and summed: that sees signs and turns, a norm does not."""
    numbers: Array = np.cos(np.arange(1.0, math.prod(shape) + 1.0)).reshape(shape)
    return numbers


def lora(n: Numbers, o: int, i: int, *kernel: int, rank: int = 2, scale: float = 1.0) -> Made:
    up, down = n(o, rank, *[1] * len(kernel)), n(rank, i, *kernel)
    delta = scale * (up.reshape(o, rank) @ down.reshape(rank, -1)).reshape(o, i, *kernel)
    return Made({"up": up, "down": down}, delta, rank)


def lora_with_bias(n: Numbers, o: int, i: int, scale: float = 1.0) -> Made:
    """The bias lies inside the scaled layer."""
    made, bias = lora(n, o, i, scale=scale), n(o)
    return Made({**made.tensors, "bias": bias}, made.delta, made.rank, scale * bias)


def lora_with_core(n: Numbers, o: int, i: int, *kernel: int, scale: float = 1.0) -> Made:
    up, mid, down = n(o, 2, 1, 1), n(2, 2, *kernel), n(2, i, 1, 1)
    delta = scale * np.einsum("om,mnhw,ni->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    return Made({"up": up, "mid": mid, "down": down}, delta, 2)


def embedding(n: Numbers, vocabulary: int, width: int, scale: float = 1.0) -> Made:
    """PEFT keeps the transposes: A is (r, vocabulary), B is (width, r)."""
    a, b = n(2, vocabulary), n(width, 2)
    return Made({"a": a, "b": b}, scale * (b @ a).T, 2)


def experts(n: Numbers, count: int, o: int, i: int, scale: float = 1.0) -> Made:
    """One layer's A (e · r, i) counts the experts slowest, B (o, r · e) fastest."""
    a, b = n(count * 2, i), n(o, 2 * count)
    delta: Array = scale * np.stack([b[:, e::count] @ a[2 * e : 2 * e + 2] for e in range(count)])
    return Made({"a": a, "b": b}, delta, 2)


def loha(n: Numbers, o: int, i: int, *kernel: int, scale: float = 1.0) -> Made:
    width = i * math.prod(kernel)
    t = {"w1_a": n(o, 2), "w1_b": n(2, width), "w2_a": n(o, 2), "w2_b": n(2, width)}
    delta = scale * (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    return Made(t, delta.reshape(o, i, *kernel), 2)


def loha_with_core(n: Numbers, o: int, i: int, *kernel: int, scale: float = 1.0) -> Made:
    t = {f"w{k}_{side}": n(2, size) for k in (1, 2) for side, size in (("a", o), ("b", i))}
    t |= {"t1": n(2, 2, *kernel), "t2": n(2, 2, *kernel)}
    one, two = (np.einsum("mnhw,mp,nq->pqhw", t[f"t{k}"], t[f"w{k}_a"], t[f"w{k}_b"]) for k in (1, 2))
    return Made(t, scale * one * two, 2)


def lokr(
    n: Numbers,
    o: int,
    i: int,
    first: str = "whole",
    second: str = "whole",
    scale: float = 1.0,
    sides: tuple[int, int] = (4, 2),
) -> Made:
    """sides: of w1. Without a factored half there is no rank, and so no scale."""
    tall, wide = sides
    t = {"w1": n(tall, wide)} if first == "whole" else {"w1_a": n(tall, 2), "w1_b": n(2, wide)}
    rows, columns = o // tall, i // wide
    t |= {"w2": n(rows, columns)} if second == "whole" else {"w2_a": n(rows, 2), "w2_b": n(2, columns)}
    one = t["w1"] if first == "whole" else t["w1_a"] @ t["w1_b"]
    two = t["w2"] if second == "whole" else t["w2_a"] @ t["w2_b"]
    rank = None if first == second == "whole" else 2
    delta = np.einsum("ab,pq->apbq", one, two).reshape(o, i)
    return Made(t, delta * scale if rank else delta, rank)


def lokr_with_core(n: Numbers, o: int, i: int, *kernel: int, scale: float = 1.0) -> Made:
    t = {"w1": n(4, 2), "t2": n(2, 2, *kernel), "w2_a": n(2, o // 4), "w2_b": n(2, i // 2)}
    second = np.einsum("mnhw,mp,nq->pqhw", t["t2"], t["w2_a"], t["w2_b"])
    delta = scale * np.einsum("ab,pqhw->apbqhw", t["w1"], second).reshape(o, i, *kernel)
    return Made(t, delta, 2)


def glora(n: Numbers, o: int, i: int, scale: float = 1.0) -> Made:
    t = {"a1": n(i, 2), "a2": n(2, i), "b1": n(o, 2), "b2": n(2, i)}
    return Made(t, scale * (base(o, i) @ t["a1"] @ t["a2"] + t["b1"] @ t["b2"]), 2)


def _cayley(skew: Array) -> Array:
    eye = np.eye(len(skew))
    return (eye + skew) @ np.linalg.inv(eye - skew)


def oft(n: Numbers, o: int, i: int, size: int = 4, rescaled: bool = False) -> Made:
    """Groups of rows, each rotated by the transpose of its block's Cayley transform."""
    blocks, weight = n(o // size, size, size, spread=0.1), base(o, i)
    turned = np.concatenate(
        [_cayley(b - b.T).T @ rows for b, rows in zip(blocks, np.split(weight, o // size), strict=True)]
    )
    if not rescaled:
        return Made({"blocks": blocks}, turned - weight)
    rescale = n(o, 1, around=1.0, spread=0.1)
    return Made({"blocks": blocks, "rescale": rescale}, rescale * turned - weight)


def boft(n: Numbers, o: int, i: int, size: int = 4) -> Made:
    """Two stages; stage s rotates rows that lie 2^s · size / 2 apart together, alternating the two."""
    blocks, weight = n(2, o // size, size, size, spread=0.1), base(o, i)
    rows = weight
    for stage, turns in enumerate(blocks):
        far = 2**stage * size // 2
        order = [
            g * 2 * far + half * far + k for g in range(o // (2 * far)) for k in range(far) for half in (0, 1)
        ]
        turned = [
            _cayley(b - b.T) @ part for b, part in zip(turns, np.split(rows[order], len(turns)), strict=True)
        ]
        rows = np.empty_like(rows)
        rows[order] = np.concatenate(turned)
    return Made({"blocks": blocks}, rows - weight)


def _skew(triangle: Array, size: int) -> Array:
    upper = np.zeros((size, size))
    upper[np.triu_indices(size, 1)] = triangle
    return upper - upper.T


def oft_of_columns(n: Numbers, o: int, i: int, size: int = 4, inverse: bool = False) -> Made:
    """Groups of columns through R = I + 2Q + 2Q² + 2Q³ + Q⁴, five terms of a series; W' = W Rᵀ."""
    blocks, weight = n(i // size, size * (size - 1) // 2, spread=0.1), base(o, i)
    parts = []
    for triangle, columns in zip(blocks, np.split(weight, i // size, axis=1), strict=True):
        q = _skew(triangle, size)
        turn = np.eye(size) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        parts.append(columns @ (turn if inverse else turn.T))
    return Made({"blocks": blocks}, np.concatenate(parts, axis=1) - weight)


def boft_of_columns(n: Numbers, o: int, i: int, size: int = 4) -> Made:
    """One stage: halves of blocks that lie next to each other, so a plain block-diagonal rotation."""
    blocks, weight = n(1, i // size, size, size, spread=0.1), base(o, i)
    rescale = n(o, 1, around=1.0, spread=0.1)
    turned = [
        columns @ _cayley(-(b - b.T) / 2).T
        for b, columns in zip(blocks[0], np.split(weight, i // size, axis=1), strict=True)
    ]
    return Made({"blocks": blocks, "rescale": rescale}, rescale * np.concatenate(turned, axis=1) - weight)


def ia3(n: Numbers, o: int, i: int, on_input: bool) -> Made:
    """LyCORIS: W' = W + W · w."""
    vector, weight = n(i if on_input else o), base(o, i)
    delta = weight * (vector if on_input else vector[:, None])
    return Made({"vector": vector}, delta, exact={"on_input": np.array(on_input)})


def ia3_factor(n: Numbers, o: int, i: int, on_input: bool) -> Made:
    """PEFT: W' = W · l."""
    vector = n(*((1, i) if on_input else (o, 1)), around=1.0)
    return Made({"vector": vector}, base(o, i) * (vector - 1.0))


def whole(n: Numbers, *shape: int) -> Made:
    value = n(*shape)
    return Made({"value": value}, value)


def replacement(n: Numbers, *shape: int) -> Made:
    value = n(*shape)
    return Made({"value": value}, value - base(*shape))


def reshape(*shape: int) -> Made:
    """Nothing is added to the weight but room."""
    return Made({}, np.zeros(shape), exact={"shape": np.array(shape, dtype=np.int64)})


def tlora(n: Numbers, o: int, i: int) -> Made:
    """What is subtracted from it comes from the base's decomposition, which the file has not."""
    return Made({"p": n(o, 2), "q": n(2, i), "lambda": n(1, 2)}, np.zeros((o, i)), 2, known=False)


def adalora(n: Numbers, o: int, i: int, scale: float = 1.0) -> Made:
    """Of rank 2 from the start; PEFT divides by the rank and a little."""
    up, down, e = n(o, 2), n(2, i), n(2, 1)
    return Made({"up": up, "down": down, "e": e}, scale * 2 / (2 + 1e-5) * up @ (e * down), 2)


def vera(n: Numbers, o: int, i: int, shared_a: Array, shared_b: Array) -> Made:
    b, d = n(o), n(len(shared_a))
    delta = b[:, None] * shared_b[:o] @ (d[:, None] * shared_a[:, :i])
    return Made({"b": b, "d": d}, delta)


def tokens(n: Numbers, vocabulary: int, width: int, places: tuple[int, ...]) -> Made:
    rows, delta = n(len(places), width), np.zeros((vocabulary, width))
    delta[list(places)] = rows - base(vocabulary, width)[list(places)]
    return Made({"rows": rows}, delta)


def dora(n: Numbers, inner: Made, axis: str) -> Made:
    """W' = m · (W + ΔW) / ‖W + ΔW‖, the norm and the magnitude of rows ("out") or of columns ("in")."""
    weight = base(*inner.delta.shape)
    moved = weight + inner.delta
    other = 1 if axis == "out" else 0
    lengths = np.sqrt((moved**2).sum(axis=other, keepdims=True))
    magnitude = n(*lengths.shape, around=2.0)
    return Made({**inner.tensors, "magnitude": magnitude}, magnitude * moved / lengths - weight, inner.rank)
