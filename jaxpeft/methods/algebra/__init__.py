"""Adapters as values: stacked, combined, converted to LoRA, merged into quantised bases."""
