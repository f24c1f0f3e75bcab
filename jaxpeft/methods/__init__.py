"""Adapters: how each method makes, binds, merges and writes them; a folder or a file a family."""

import jaxpeft.methods.builtin  # noqa: F401  # whoever imports one of its modules can rely on all
