"""What changes with the step, as pure functions: learning rate, rows of a batch, weight of the MTP loss.

The rate rises linearly, stays, and falls over the last share of the steps: linearly to zero (arXiv 2405.18392,
section 3) or along half a cosine to a fraction of its peak (DeepSeek-V4, arXiv 2606.19348, section 4.2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

TAILS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
}


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    warmup_steps: int,
    decay_fraction: float,
    tail: str = "linear",
    final_fraction: float = 0.0,
) -> float:
    """Rate of step 0 <= step < steps.

    decay_fraction: the last share of the steps, over which it falls to final_fraction * peak along `tail`, a key of
    `TAILS`.
    """
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    fall = final_fraction + (1 - final_fraction) * TAILS[tail](_left(step, steps, decay_fraction))
    return peak * min(warm, fall)


def mtp_weight(step: int, steps: int, decay_fraction: float, before: float = 0.3, during: float = 0.1) -> float:
    """Weight of the multi-token-prediction loss before and during the decay of the learning rate."""
    return during if _left(step, steps, decay_fraction) < 1 else before


def _left(step: int, steps: int, decay_fraction: float) -> float:
    """Share of the decay that is still to come: 1 until it starts, 0 after the last step."""
    decay_steps = decay_fraction * steps
    return min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0


def batch_rows(step: int, rows: int, start_rows: int, ramp_steps: int) -> int:
    """Rows of the batch of `step`: from `start_rows` in a line to `rows`, which it has from step `ramp_steps` on."""
    return rows if step >= ramp_steps else start_rows + (rows - start_rows) * step // ramp_steps


def first_row(step: int, rows: int, start_rows: int, ramp_steps: int) -> int:
    """Rows that the steps before `step` took: the global index of the first row of its batch."""
    ramped = sum(batch_rows(before, rows, start_rows, ramp_steps) for before in range(min(step, ramp_steps)))
    return ramped + rows * max(0, step - ramp_steps)
