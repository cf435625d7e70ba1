"""Several adapters of one base model as one: the methods, and how the inputs stand to each other.

Every method is defined on the deltas, never on their factors: up and down of one adapter mean nothing
beside those of another.
"""

from adapterkit.merging.inputs import Input
from adapterkit.merging.interference import Interference
from adapterkit.merging.making import Recipe, merged
from adapterkit.merging.methods import METHODS, Method
from adapterkit.merging.settings import Divide, Inner, Settings

__all__ = ["METHODS", "Divide", "Inner", "Input", "Interference", "Method", "Recipe", "Settings", "merged"]
