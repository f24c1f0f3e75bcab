"""Adapters: how each method makes, binds, merges and writes them; a folder or a file a family."""
