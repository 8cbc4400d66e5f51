"""Learning rate over the steps: linear warm-up, constant, linear decay to zero (arXiv 2405.18392, section 3)."""

from __future__ import annotations


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, decay_fraction: float) -> float:
    """Rate of step 0 <= step < steps. decay_fraction: the last share of the steps, over which it falls to zero."""
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    decay_steps = decay_fraction * steps
    fall = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    return peak * min(warm, fall)
