"""Decoding, and what is measured of a model."""
