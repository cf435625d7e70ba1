"""The kinds of change an adapter makes to a weight, and what can be done with them exactly.

Importing this imports torch; `adapterkit.specs.kinds` holds the facts that need none of it.
"""

from adapterkit.deltas.build import build, magnitude_axis
from adapterkit.deltas.change import Change
from adapterkit.deltas.compare import cosine, identical, norm, relative_error
from adapterkit.deltas.experts import ExpertsLowRank
from adapterkit.deltas.factored import AdaLora, TLora, Vera
from adapterkit.deltas.fold import fold, fold_closely
from adapterkit.deltas.glora import Glora
from adapterkit.deltas.hadamard import Hadamard
from adapterkit.deltas.kronecker import Kronecker
from adapterkit.deltas.low_rank import EmbeddingLowRank, LowRank
from adapterkit.deltas.magnitude import Axis, Magnitude
from adapterkit.deltas.rotation import EmbeddingRotation, InputButterfly, InputRotation, Rotation
from adapterkit.deltas.scaling import Scaling
from adapterkit.deltas.stack import stack
from adapterkit.deltas.sums import add, transpose
from adapterkit.deltas.whole import Reshape, Tokens, Whole

__all__ = [
    "AdaLora",
    "Axis",
    "Change",
    "EmbeddingLowRank",
    "EmbeddingRotation",
    "ExpertsLowRank",
    "Glora",
    "Hadamard",
    "InputButterfly",
    "InputRotation",
    "Kronecker",
    "LowRank",
    "Magnitude",
    "Reshape",
    "Rotation",
    "Scaling",
    "TLora",
    "Tokens",
    "Vera",
    "Whole",
    "add",
    "build",
    "cosine",
    "fold",
    "fold_closely",
    "identical",
    "magnitude_axis",
    "norm",
    "relative_error",
    "stack",
    "transpose",
]
