"""Where to compute."""

from __future__ import annotations

import torch

from adapterkit.errors import UsageError


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of this name, tried out; None: the processor. UsageError if there is none such here."""
    if name is None:
        return torch.device("cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch's sentences about missing drivers and unknown names are long, and of several kinds.
        raise UsageError(
            f"`{name}` is no device that can compute here",
            code="device",
            hint="cpu is always there; cuda needs an NVIDIA card and torch built for it, mps one of Apple's",
            details={"torch": str(error)[:200]},
        ) from error
    return found
