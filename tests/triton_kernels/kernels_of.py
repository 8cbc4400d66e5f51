"""What the folder of the Triton kernels holds, read from its text."""

from __future__ import annotations

import ast
from pathlib import Path

from moe_kernels.triton import tiles

# What the reference computes wherever Triton does: operations of a decoding step, the device's own product, and two
# without a kernel, `balance` and `index_scores`.
LEFT_OUT = {"decode_compressed_attention", "decode_experts", "decode_latent_attention", "skinny_linear"}
LEFT_OUT |= {"balance", "index_scores", "linear"}
FILES = sorted(Path(tiles.__file__).parent.glob("*.py"))


def kernels() -> dict[str, ast.FunctionDef]:
    """Functions that Triton compiles and something launches as `name[grid(...)](...)`, by file.name."""
    found = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        launched = {ast.unparse(call.value) for call in calls if isinstance(call, ast.Subscript)}
        functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in launched)
        found |= {f"{path.stem}.{node.name}": node for node in functions}
    return found
