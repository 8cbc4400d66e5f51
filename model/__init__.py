"""What is learnt and how: a DeepSeek-style mixture-of-experts transformer, its training loop and its checkpoints.

Names are imported on first use, so that checking a configuration does not wait for PyTorch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.generate import generate
    from model.hf import load_pretrained, save_pretrained
    from model.size import count_parameters
    from model.transformer import MoETransformer, build

_HOMES = {
    "ModelConfig": "config",
    "MoETransformer": "transformer",
    "build": "transformer",
    "count_parameters": "size",
    "generate": "generate",
    "load_pretrained": "hf",
    "save_pretrained": "hf",
}

__all__ = [
    "MoETransformer",
    "ModelConfig",
    "build",
    "count_parameters",
    "generate",
    "load_pretrained",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    return getattr(import_module(f"model.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """Keeps the name `generate` for the function when the file of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "generate" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
