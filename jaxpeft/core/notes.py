"""Prints notes and warnings, which are no errors, on standard error."""

import contextlib
import os
import sys


def note(text: str) -> None:
    """Prints ``note: text``."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Prints ``warning: text``."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def say_now(text: str) -> None:
    """Prints a line without locks and buffers: from a signal handler, or as a process ends."""
    write_error(f"\n{text}\n".encode())


def write_error(text: bytes) -> None:
    """Writes bytes on standard error without locks and buffers; a closed one is no error."""
    with contextlib.suppress(OSError):
        os.write(2, text)
