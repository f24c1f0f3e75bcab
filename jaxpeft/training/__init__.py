"""A training run: its data, its state, its log, its saves."""
