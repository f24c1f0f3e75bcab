"""Turns base parameters and adapters into each other: see `jaxpeft.methods.base`."""
