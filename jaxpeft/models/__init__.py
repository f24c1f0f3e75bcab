"""Decoders: their config and their code."""
