"""Soft prompts, and prefixes of keys and values."""
