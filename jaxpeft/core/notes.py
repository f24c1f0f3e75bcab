"""Prints notes and warnings, which are no errors, on standard error."""

import sys


def note(text: str) -> None:
    """Prints ``note: text``."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Prints ``warning: text``."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
