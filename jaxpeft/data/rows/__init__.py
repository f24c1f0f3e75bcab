"""Rows of a data file: read with the line each starts on, and checked."""
