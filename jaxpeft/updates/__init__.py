"""One update, pure: loss, optimizer, step."""
