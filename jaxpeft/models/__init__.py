"""Decoders: their config, their code, and their weights in and out."""
