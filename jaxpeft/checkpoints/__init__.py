"""States of a run on disk: whole or invisible, verified before use."""
