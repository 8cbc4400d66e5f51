"""What is learnt and how: a DeepSeek-style mixture-of-experts transformer, its training loop and its checkpoints."""

from model.config import ModelConfig, count_parameters
from model.generate import generate
from model.hf import load_pretrained, save_pretrained
from model.transformer import MoETransformer, build

__all__ = [
    "MoETransformer",
    "ModelConfig",
    "build",
    "count_parameters",
    "generate",
    "load_pretrained",
    "save_pretrained",
]
