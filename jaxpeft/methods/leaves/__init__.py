"""Families that train copies or rows of leaves of the base."""
