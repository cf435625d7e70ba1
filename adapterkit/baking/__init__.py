"""Adapters into base models: what a bake does to which tensor, the arithmetic, and the way back."""
