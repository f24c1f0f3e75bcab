"""Chat templates run with all work counted, to the text that transformers gives."""
