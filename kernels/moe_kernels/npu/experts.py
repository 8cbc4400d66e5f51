"""The routed experts of one layer: sort, two grouped products around a gated activation, bring back.

Shapes: T tokens, D hidden size, F expert width, E experts, K experts per token, N = T * K routed rows.
Nothing here waits for the device: the number of rows of each expert stays there.
"""

from __future__ import annotations

from torch import Tensor

from moe_kernels.autocast import in_autocast_dtype
from moe_kernels.npu import grouped_matmul as products
from moe_kernels.npu import permute as rows
from moe_kernels.npu import swiglu as activation
from moe_kernels.npu.grouped_matmul import grouped_matmul
from moe_kernels.npu.permute import permute, unpermute
from moe_kernels.npu.swiglu import swiglu

NEEDS = products.NEEDS | rows.NEEDS | activation.NEEDS


def experts(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    limit: float | None = None,
) -> Tensor:
    """Mixture of SwiGLU experts, [T, D] -> [T, D]."""
    x_TD, gate_up_E2FD, down_EDF = in_autocast_dtype(x_TD, gate_up_E2FD, down_EDF)
    x_ND, places_TK, counts_E = permute(x_TD, indices_TK, len(gate_up_E2FD))
    hidden_NF = swiglu(grouped_matmul(x_ND, gate_up_E2FD, counts_E), limit)
    return unpermute(grouped_matmul(hidden_NF, down_EDF, counts_E), places_TK, weights_TK)
