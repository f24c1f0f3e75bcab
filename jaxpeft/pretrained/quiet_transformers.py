"""Imports the transformers package on demand."""

import os
from typing import Any


def import_transformers() -> Any:
    """Imports transformers without its advice to install torch, which is not needed."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = before or "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[name]
    return transformers
