"""Folders of Hugging Face models, read."""
