"""One small change of every kind and shape, seeded, with its delta written out index by index.

The formulas here are the definitions, said as slowly as possible: no shared code, no reshaping tricks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from adapterkit.deltas import Change, build

Formula = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A change, the weight it changes, and the new weight by the definition (in float64)."""

    change: Change
    base: Tensor
    expected: Tensor


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def everywhere(*sizes: int) -> Iterator[tuple[int, ...]]:
    return product(*(range(size) for size in sizes))


def lora(kernel: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, kind: str = "lora") -> Case:
    o, r, i = 12, 4, 6
    ones = (1,) * len(kernel)
    up, down = numbers(o, r, *ones, seed=1, dtype=dtype), numbers(r, i, *kernel, seed=2, dtype=dtype)
    base = numbers(o, i, *kernel, seed=3)
    expected = base.clone()
    for p, q, *xy in everywhere(o, i, *kernel):
        at = (p, q, *xy)
        expected[at] += 0.75 * sum(float(up.reshape(o, r)[p, m]) * float(down[(m, q, *xy)]) for m in range(r))
    return Case(build(kind, {"up": up, "down": down}, scale=0.75), base, expected)


def experts() -> Case:
    e, o, r, i = 12, 4, 2, 5
    up, down = numbers(o, r * e, seed=1), numbers(e * r, i, seed=2)
    expected = numbers(e, o, i, seed=3)
    base = expected.clone()
    for n, p, q in everywhere(e, o, i):
        expected[n, p, q] += 0.75 * sum(up[p, m * e + n] * down[n * r + m, q] for m in range(r))
    return Case(build("experts", {"up": up, "down": down}, scale=0.75, count=e), base, expected)


def lora_mid() -> Case:
    o, r, i, h, w = 12, 3, 5, 3, 2
    up, down, mid = numbers(o, r, 1, 1, seed=1), numbers(r, i, 1, 1, seed=2), numbers(r, r, h, w, seed=3)
    base = numbers(o, i, h, w, seed=4)
    expected = base.clone()
    for p, q, x, y in everywhere(o, i, h, w):
        expected[p, q, x, y] += 0.5 * sum(
            up[p, m, 0, 0] * mid[m, n, x, y] * down[n, q, 0, 0] for m, n in everywhere(r, r)
        )
    return Case(build("lora", {"up": up, "down": down, "mid": mid}, scale=0.5), base, expected)


def loha(kernel: tuple[int, ...] = ()) -> Case:
    o, r, i = 12, 3, 5
    size = int(torch.tensor(kernel).prod()) if kernel else 1
    w1_a, w2_a = numbers(o, r, seed=1), numbers(o, r, seed=2)
    w1_b, w2_b = numbers(r, i * size, seed=3), numbers(r, i * size, seed=4)
    base = numbers(o, i, *kernel, seed=5)
    delta = torch.zeros(o, i * size, dtype=torch.float64)
    for p, q in everywhere(o, i * size):
        first = sum(w1_a[p, m] * w1_b[m, q] for m in range(r))
        second = sum(w2_a[p, m] * w2_b[m, q] for m in range(r))
        delta[p, q] = 0.25 * first * second
    roles = {"w1_a": w1_a, "w1_b": w1_b, "w2_a": w2_a, "w2_b": w2_b}
    change = build("loha", roles, scale=0.25, weight_shape=tuple(base.shape))
    return Case(change, base, base + delta.reshape(base.shape))


def loha_core() -> Case:
    o, r, i, h, w = 12, 2, 5, 3, 2
    roles = {
        "w1_a": numbers(r, o, seed=1),
        "w1_b": numbers(r, i, seed=2),
        "w2_a": numbers(r, o, seed=3),
        "w2_b": numbers(r, i, seed=4),
        "t1": numbers(r, r, h, w, seed=5),
        "t2": numbers(r, r, h, w, seed=6),
    }
    base = numbers(o, i, h, w, seed=7)
    expected = base.clone()
    for p, q, x, y in everywhere(o, i, h, w):
        halves = [
            sum(
                roles[f"t{n}"][a, b, x, y] * roles[f"w{n}_a"][a, p] * roles[f"w{n}_b"][b, q]
                for a, b in everywhere(r, r)
            )
            for n in (1, 2)
        ]
        expected[p, q, x, y] += 0.25 * halves[0] * halves[1]
    return Case(build("loha", roles, scale=0.25, weight_shape=tuple(base.shape)), base, expected)


def lokr(first: str = "full", second: str = "full", kernel: tuple[int, ...] = ()) -> Case:
    """w1 is 3x2 and w2 4x3, each full or factored, so the weight is 12x6."""
    (tall, m), (k, n), r = (3, 2), (4, 3), 2
    size = int(torch.tensor(kernel).prod()) if kernel else 1
    roles: dict[str, Tensor] = {}
    if first == "full":
        w1 = roles["w1"] = numbers(tall, m, seed=1)
    else:
        roles |= {"w1_a": numbers(tall, 1, seed=1), "w1_b": numbers(1, m, seed=2)}
        w1 = roles["w1_a"] @ roles["w1_b"]
    w2 = torch.zeros(k, n, *kernel, dtype=torch.float64)
    if second == "full":
        w2 = roles["w2"] = numbers(k, n, *kernel, seed=3)
    elif second == "factored":
        roles |= {"w2_a": numbers(k, r, seed=3), "w2_b": numbers(r, n * size, seed=4)}
        w2 = (roles["w2_a"] @ roles["w2_b"]).reshape(k, n, *kernel)
    else:
        roles |= {"w2_a": numbers(r, k, seed=3), "w2_b": numbers(r, n, seed=4)}
        roles["t2"] = numbers(r, r, *kernel, seed=5)
        for p, q, x, y in everywhere(k, n, *kernel):
            w2[p, q, x, y] = sum(
                roles["t2"][a, b, x, y] * roles["w2_a"][a, p] * roles["w2_b"][b, q]
                for a, b in everywhere(r, r)
            )
    base = numbers(tall * k, m * n, *kernel, seed=6)
    expected = base.clone()
    for p, q, s, t in everywhere(tall, m, k, n):
        expected[p * k + s, q * n + t] += 0.5 * w1[p, q] * w2[s, t]
    return Case(build("lokr", roles, scale=0.5, weight_shape=tuple(base.shape)), base, expected)


def glora(kernel: tuple[int, ...] = ()) -> Case:
    o, i, r = 12, 6, 2
    ones = (1,) * len(kernel)
    a1, a2 = numbers(i, r, *ones, seed=1), numbers(r, i, *ones, seed=2)
    b1, b2 = numbers(o, r, *ones, seed=3), numbers(r, i, *kernel, seed=4)
    base = numbers(o, i, *kernel, seed=5)
    expected = base.clone()
    mix = a1.reshape(i, r) @ a2.reshape(r, i)
    for p, q in everywhere(o, i):
        own = sum(b1.reshape(o, r)[p, m] * b2[m, q] for m in range(r))
        mixed = sum(base[p, c] * mix[c, q] for c in range(i))
        expected[p, q] = base[p, q] + 0.5 * (own + mixed)
    return Case(build("glora", {"a1": a1, "a2": a2, "b1": b1, "b2": b2}, scale=0.5), base, expected)


def oft(kernel: tuple[int, ...] = (), constraint: float = 0.0, rescaled: bool = True) -> Case:
    o, size = 12, 4
    blocks = numbers(o // size, size, size, seed=1) * 0.3
    rescale = numbers(o, 1, *(1,) * len(kernel), seed=2)
    base = numbers(o, 5, *kernel, seed=3)
    skews = blocks - blocks.transpose(1, 2)
    length = float((skews**2).sum().sqrt())
    if 0 < constraint * o < length:
        skews = skews * (constraint * o / length)
    eye = torch.eye(size, dtype=torch.float64)
    expected = base.clone()
    for group, skew in enumerate(skews):
        rotation = (eye + skew) @ torch.linalg.inv(eye - skew)
        for p, q in everywhere(size, 5):
            expected[group * size + p, q] = sum(
                rotation[n, p] * base[group * size + n, q] for n in range(size)
            )
    roles = {"blocks": blocks}
    if rescaled:
        roles["rescale"] = rescale
        expected = expected * rescale
    return Case(build("oft", roles, constraint=constraint, weight_shape=tuple(base.shape)), base, expected)


def boft() -> Case:
    """Two stages of blocks of four: the second brings rows together that are four apart."""
    o, size = 16, 4
    blocks, rescale = numbers(2, o // size, size, size, seed=1) * 0.3, numbers(o, 1, seed=2)
    base = numbers(o, 5, seed=3)
    eye = torch.eye(size, dtype=torch.float64)
    expected = base.clone()
    for stage, distance in enumerate((2, 4)):
        before = expected.clone()
        members = [
            (start + offset, start + offset + distance)
            for start in range(0, o, 2 * distance)
            for offset in range(distance)
        ]
        order = [row for pair in members for row in pair]
        for group in range(o // size):
            rows = order[group * size : (group + 1) * size]
            skew = blocks[stage, group] - blocks[stage, group].T
            rotation = (eye + skew) @ torch.linalg.inv(eye - skew)
            for p, row in enumerate(rows):
                expected[row] = sum(rotation[p, n] * before[other] for n, other in enumerate(rows))
    change = build("boft", {"blocks": blocks, "rescale": rescale}, weight_shape=(o, 5))
    return Case(change, base, expected * rescale)


def oft_input(
    kernel: tuple[int, ...] = (),
    neumann: bool = True,
    share: bool = False,
    scaled: bool = False,
    inverse: bool = False,
    kind: str = "oft_input",
) -> Case:
    o, size, count = 12, 3, 2
    channels = size * count
    base = numbers(o, channels, *kernel, seed=3)
    columns = base.reshape(o, -1)
    groups = columns.shape[1] // size
    triangles = numbers(1 if share else groups, size * (size - 1) // 2, seed=1) * 0.1
    eye = torch.eye(size, dtype=torch.float64)
    expected = columns.clone()
    for group in range(groups):
        a, b, c = (triangles[0 if share else group] / (2 * 2**0.5 if scaled else 1)).tolist()
        skew = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]], dtype=torch.float64)
        square = skew @ skew
        if neumann:
            rotation = eye + 2 * skew + 2 * square + 2 * square @ skew + square @ square
        else:
            rotation = (eye - skew) @ torch.linalg.inv(eye + skew)
        turn = rotation if inverse else rotation.T
        part = slice(group * size, (group + 1) * size)
        expected[:, part] = columns[:, part] @ turn
    roles = {"blocks": triangles} | ({"scaled": torch.tensor(True)} if scaled else {})
    facts = {"cayley_neumann": neumann, "block_share": share}
    if kind == "oft_input":
        facts["inverse"] = inverse
    change = build(kind, roles, scale=1.0, weight_shape=tuple(base.shape), **facts)
    return Case(change, base, expected.reshape(base.shape))


def boft_input() -> Case:
    """One stage: rotated columns in blocks, then scaled rows."""
    o, size, count = 12, 3, 2
    blocks, rescale = numbers(1, count, size, size, seed=1) * 0.3, numbers(o, 1, seed=2)
    base = numbers(o, size * count, seed=3)
    eye = torch.eye(size, dtype=torch.float64)
    rotations = []
    for block in blocks[0]:
        skew = (block - block.T) / 2
        rotations.append((eye - skew) @ torch.linalg.inv(eye + skew))
    expected = rescale * (base @ torch.block_diag(*rotations).T)
    return Case(build("boft_input", {"blocks": blocks, "rescale": rescale}), base, expected)


def ia3(on_input: bool, additive: bool, kernel: tuple[int, ...] = ()) -> Case:
    base = numbers(12, 6, *kernel, seed=1)
    vector = numbers(6 if on_input else 12, seed=2)
    expected = base.clone()
    for p, q in everywhere(12, 6):
        number = vector[q] if on_input else vector[p]
        expected[p, q] = base[p, q] * (1 + number if additive else number)
    facts = {"on_input": on_input, "additive": additive, "weight_shape": tuple(base.shape)}
    return Case(build("ia3", {"vector": vector}, **facts), base, expected)  # type: ignore[arg-type]


def whole(kind: str, shape: tuple[int, ...] = (12, 6)) -> Case:
    base, value = numbers(*shape, seed=1), numbers(*shape, seed=2)
    return Case(build(kind, {"value": value}), base, value.clone() if kind == "set" else base + value)


def dora(axis: str, inner: Case) -> Case:
    base, moved = inner.base, inner.expected
    length = numbers(12 if axis == "out" else base.shape[1], seed=9).abs()
    expected = torch.zeros_like(base)
    for number, size in enumerate(length):
        lane = (number,) if axis == "out" else (slice(None), number)
        expected[lane] = size * moved[lane] / (moved[lane] ** 2).sum().sqrt()
    stored = length.reshape(-1, 1) if axis == "out" else length.reshape(1, -1)
    held = inner.change
    change = build(held.kind, {**held.tensors(), "magnitude": stored}, **_facts(held))  # type: ignore[arg-type]
    return Case(change, base, expected)


def _facts(change: Change) -> dict[str, object]:
    facts: dict[str, object] = {"scale": getattr(change, "scale", 1.0)}
    if getattr(change, "weight_shape", None):
        facts["weight_shape"] = getattr(change, "weight_shape")  # noqa: B009
    return facts


def adalora() -> Case:
    o, r, i = 12, 3, 6
    up, down, e = numbers(o, r, seed=1), numbers(r, i, seed=2), numbers(r, 1, seed=3)
    base = numbers(o, i, seed=4)
    expected = base + 6.0 / (5 + 1e-5) * (up @ torch.diag(e[:, 0]) @ down)
    roles = {"up": up, "down": down, "e": e}
    return Case(build("adalora", roles, scale=6.0 / r, initial_rank=5), base, expected)


def vera() -> Case:
    o, r, i = 12, 3, 6
    b, d = numbers(o, seed=1), numbers(r, seed=2)
    shared_a, shared_b = numbers(r, i + 4, seed=3), numbers(o + 3, r, seed=4)
    base = numbers(o, i, seed=5)
    expected = base + torch.diag(b) @ shared_b[:o] @ torch.diag(d) @ shared_a[:, :i]
    change = build("vera", {"b": b, "d": d}, weight_shape=(o, i), shared_a=shared_a, shared_b=shared_b)
    return Case(change, base, expected)


def tokens() -> Case:
    base, rows = numbers(12, 6, seed=1), numbers(3, 6, seed=2)
    expected = base.clone()
    for place, row in zip((1, 7, 4), rows, strict=True):
        expected[place] = row
    return Case(build("tokens", {"rows": rows}, weight_shape=(12, 6), indices=(1, 7, 4)), base, expected)


CASES: dict[str, Callable[[], Case]] = {
    "lora": lora,
    "lora, convolution": lambda: lora((3, 2)),
    "lora, 1x1 convolution": lambda: lora((1, 1)),
    "lora, one axis of convolution": lambda: lora((3,)),
    "lora, mid": lora_mid,
    "lora, half precision": lambda: lora(dtype=torch.float16),
    "lora, eight bits": lambda: lora(dtype=torch.float8_e4m3fn),
    "embedding": lambda: lora(kind="embedding"),
    "experts": experts,
    "loha": loha,
    "loha, convolution": lambda: loha((3, 2)),
    "loha, core": loha_core,
    "lokr": lokr,
    "lokr, second factored": lambda: lokr(second="factored"),
    "lokr, both factored": lambda: lokr("factored", "factored"),
    "lokr, convolution": lambda: lokr(kernel=(3, 2)),
    "lokr, factored convolution": lambda: lokr("factored", "factored", kernel=(3, 2)),
    "lokr, core": lambda: lokr(second="core", kernel=(3, 2)),
    "glora": glora,
    "glora, convolution": lambda: glora((3, 2)),
    "oft": oft,
    "oft, not rescaled": lambda: oft(rescaled=False),
    "oft, convolution": lambda: oft((3, 2)),
    "oft, loosely constrained": lambda: oft(constraint=2.0),
    "oft, constrained": lambda: oft(constraint=0.01),
    "boft": boft,
    "oft_input": oft_input,
    "oft_input, solved": lambda: oft_input(neumann=False),
    "oft_input, convolution": lambda: oft_input((3, 2)),
    "oft_input, shared": lambda: oft_input(share=True),
    "oft_input, scaled": lambda: oft_input(scaled=True),
    "oft_input, inverse": lambda: oft_input(inverse=True),
    "oft_embedding": lambda: oft_input(inverse=True, kind="oft_embedding"),
    "boft_input": boft_input,
    "ia3, rows added": lambda: ia3(False, True),
    "ia3, columns added": lambda: ia3(True, True),
    "ia3, rows": lambda: ia3(False, False),
    "ia3, columns": lambda: ia3(True, False),
    "ia3, convolution": lambda: ia3(True, True, (3, 2)),
    "diff": lambda: whole("diff"),
    "diff, bias": lambda: whole("diff", (12,)),
    "set": lambda: whole("set"),
    "adalora": adalora,
    "vera": vera,
    "tokens": tokens,
    "dora, rows": lambda: dora("out", lora()),
    "dora, columns": lambda: dora("in", lora()),
    "dora, rows of a convolution": lambda: dora("out", lora((3, 2))),
    "dora, columns of a convolution": lambda: dora("in", lora((3, 2))),
    "dora over loha": lambda: dora("out", loha()),
    "dora over lokr": lambda: dora("in", lokr()),
}
