"""Linear algebra on factored matrices."""
