"""What the oracles share: random adapters, quiet libraries, and the two laws.

Reading: what our `load` makes of a file is what the library itself does to the model's weights.
Writing: what we write loads without a word of warning and does the same to the weights.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from adapterkit.adapter import Adapter
from adapterkit.deltas import Change

Weights = Mapping[str, Tensor]
Turn = Callable[[str, Tensor], Tensor]

LIBRARIES = ("peft", "diffusers", "transformers", "LyCORIS")
# Multipliers of rows and columns: near one, where training starts.
NEAR_ONE = ("magnitude", "ia3_l", "boft_s", "dora_scale", "rescale")


class _Listener(logging.Handler):
    """Keeps what is said."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def silence(but: str = "") -> Iterator[None]:
    """Fail if a library logs or raises a warning: a key it misses, or one it does not expect.

    but: the beginning of a message that is none.
    """
    handler = _Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("error", RuntimeWarning)
            # PEFT has a kernel for BOFT on CUDA and does without it elsewhere.
            warnings.filterwarnings("ignore", message="Failed to load the CUDA extension")
            warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor to 1")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    said = [message[:300] for message in handler.messages]
    assert not [text for text in said if not (but and text.startswith(but))], said


def randomise(
    model: nn.Module, seed: int = 0, deviation: float = 0.2, chosen: Callable[[str], bool] | None = None
) -> None:
    """Give every trainable parameter (or the chosen ones) random values; untrained ones are zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if chosen(name) if chosen else parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator) * deviation
                parameter.copy_(values + 1.0 if any(mark in name for mark in NEAR_ONE) else values)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changes_of(adapter: Adapter, component: str, kind: str = "") -> dict[str, tuple[Change, ...]]:
    """The adapter's changes (of one kind) by the name of the parameter; none of them may be fused."""
    found: dict[str, tuple[Change, ...]] = {}
    for place, changes in adapter.changes.items():
        if place.component == component and (not kind or changes[0].kind == kind):
            (piece,) = place.span
            found[f"{piece.module}.{place.param}" if place.param else piece.module] = changes
    return found


def as_is(name: str, weight: Tensor) -> Tensor:
    return weight


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖, in double precision."""
    size = float(theirs.double().norm())
    return float((ours.double() - theirs.double()).norm()) / size if size else float(ours.double().norm())


def check_deltas(
    adapter: Adapter,
    before: Weights,
    after: Weights,
    *,
    component: str,
    turn: Turn = as_is,
    tolerance: float = 2e-6,
) -> float:
    """Every parameter of the model is changed by the adapter as it is between `before` and `after`.

    turn: makes a stored weight (out, in). Returns the greatest relative error.
    """
    left = changes_of(adapter, component)
    worst = 0.0
    for name, weight in before.items():
        base = turn(name, weight).double()
        expected = turn(name, after[name]).double() - base
        total = sum((c.dense(base, torch.float64) for c in left.pop(name, ())), torch.zeros_like(base))
        error = relative(total, expected)
        assert error <= tolerance, (name, error)
        worst = max(worst, error)
    assert not left, f"changes of what the model has not: {sorted(left)}"
    return worst


def check_same(ours: Weights, theirs: Weights, base: Weights, tolerance: float = 2e-6) -> float:
    """Two sets of weights are the base changed alike; at least one weight is changed."""
    assert ours.keys() == theirs.keys() == base.keys()
    errors = {name: relative(ours[name] - base[name], theirs[name] - base[name]) for name in base}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, (worst, errors[worst])
    assert any(not torch.equal(ours[name], base[name]) for name in base)
    return errors[worst]
