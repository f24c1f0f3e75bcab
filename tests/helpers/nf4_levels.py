"""The sixteen values of NF4, from the normal distribution and not from the code."""

import statistics

import numpy as np


def normal_levels() -> np.ndarray:
    """Quantiles as appendix E of the QLoRA paper has them, 0 exactly, the largest 1."""
    inverse = statistics.NormalDist().inv_cdf
    upper = [inverse(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    lower = [-inverse(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    levels = np.array(sorted([*lower, 0.0, *upper]))
    return levels / levels.max()
