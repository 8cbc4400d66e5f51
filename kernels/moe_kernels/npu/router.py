"""Routing on Ascend is the reference: the fused gates have no backward pass that can be traced, and fp32 decides."""

from moe_kernels.reference.router import route

__all__ = ["route"]
