"""The hot operations of a mixture-of-experts transformer, one function each.

`reference/` in plain PyTorch defines what each operation means; `device.py` is the only place that names devices.
"""

from moe_kernels.reference.experts import experts
from moe_kernels.reference.newton_schulz import newton_schulz
from moe_kernels.reference.sinkhorn import sinkhorn
from moe_kernels.reference.window_attention import cached_window_attention, window_attention

__all__ = ["cached_window_attention", "experts", "newton_schulz", "sinkhorn", "window_attention"]
