"""The YAML of a run: its sections, its keys, and a strict reader."""
