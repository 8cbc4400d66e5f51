"""The kernels use what triton-ascend documents, and nothing that is CUDA's alone.

LANGUAGE: names of triton.language that triton-ascend's table of operations marks as working in fp32, bf16 and int32
(docs/sources/python-api/outline.md), as far as they are used here, and types.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from kernels_of import FILES, kernels

TYPES = {"constexpr", "tensor", "float32", "int32", "int64"}
LANGUAGE = TYPES | {
    "abs", "arange", "cast", "cdiv", "cumsum", "dot", "exp", "full", "load", "log", "max", "maximum", "min", "minimum",
    "num_programs", "program_id", "rsqrt", "sigmoid", "sqrt", "store", "sum", "trans", "where", "zeros",
}  # fmt: skip
ON_THE_HOST = {"cdiv", "jit", "next_power_of_2", "language", "runtime"}  # of triton itself


def attributes(tree: ast.AST, module: str) -> set[str]:
    """Names that are taken from what `module` is called."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_of_the_language(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert attributes(tree, "tl") <= LANGUAGE
    assert attributes(tree, "triton") <= ON_THE_HOST
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module for module in modules if module.split(".")[0] == "triton"} <= {"triton", "triton.language"}


def test_the_list_names_nothing_that_is_not_used() -> None:
    assert set().union(*(attributes(ast.parse(path.read_text()), "tl") for path in FILES)) == LANGUAGE


@pytest.mark.parametrize("name", kernels())
def test_a_kernel_takes_its_tasks_in_turn(name: str) -> None:
    """However few programs there are: tasks begin at the program's number and go on by how many there are."""
    loops = [ast.unparse(node.iter) for node in ast.walk(kernels()[name]) if isinstance(node, ast.For)]
    turns = [loop for loop in loops if loop.startswith("range(tl.program_id(0), ")]
    assert len(turns) == 1 and turns[0].endswith(", tl.num_programs(0))")
