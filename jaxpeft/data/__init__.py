"""From rows of a file to batches: read, checked, rendered, tokenised, packed, read by step."""
