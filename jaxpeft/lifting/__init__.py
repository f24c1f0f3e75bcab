"""Adapters for models that are not ours: what a traced function does with its parameters."""
