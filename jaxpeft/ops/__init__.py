"""Products with weights that may be more than an array: the node protocol, quantised kernels."""
