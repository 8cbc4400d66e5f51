"""The hot operations of a mixture-of-experts transformer, one function each.

`reference/` in plain PyTorch defines what each operation means; `device.py` is the only place that names devices.
"""

from moe_kernels.reference.experts import experts
from moe_kernels.reference.newton_schulz import newton_schulz

__all__ = ["experts", "newton_schulz"]
