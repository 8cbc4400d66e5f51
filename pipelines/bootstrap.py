"""How sure a ratio of sums is: Efron's percentile bootstrap over its pairs."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def interval(parts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """95 % interval of sum(parts) / sum(sizes), by a bootstrap over their pairs; [2]."""
    draws = np.random.default_rng(0).integers(len(parts), size=(RESAMPLES, len(parts)))
    return np.quantile(parts[draws].sum(1) / sizes[draws].sum(1), [0.025, 0.975])
