"""The operators of one training step on `npu`, in order of their number, into kernels/README.md.

`make test-npu` checks that the list there is this one; `.venv-npu/bin/python kernels/bench/npu_step.py` renews it,
with LD_LIBRARY_PATH naming the emulator as the Makefile does. A small DeepSeek-V4 in bfloat16 trains three steps; the
trace of the third, after everything that happens once, is what counts.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(?<=<!-- operators of one step -->\n).*?(?=<!-- end -->)", re.DOTALL)


class Rows:
    """Rows of counted-up ids, two documents each."""

    def row(self, index: int) -> tuple[Any, Any, Any]:
        import numpy as np

        ids = (np.arange(65) * (index + 1)) % 64
        return ids[:-1], ids[1:], (np.arange(64) >= 20).astype(np.int64)


def one_step() -> Counter[str]:
    """Operator -> calls in one step, as the emulator executed them."""
    folder = Path(tempfile.mkdtemp())
    os.environ["FAKECANN_TRACE"] = str(folder / "trace")  # read when torch_npu first asks for its devices
    import torch

    from model import ModelConfig, build
    from model.checkpoint import CheckpointStore
    from model.train import TrainConfig, train

    ends: list[int] = []

    def report(step: int, record: dict[str, float]) -> None:
        ends.append(len((folder / "trace").read_text().split()))

    small = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "n_routed_experts": 8}
    net = build(ModelConfig.preset("demo").replace(**small), seed=0)
    config = TrainConfig(
        steps=3, batch_tokens=128, sequence_length=64, learning_rate=1e-3, precision="bfloat16", checkpoint_every=100
    )
    train(net, Rows(), config, CheckpointStore(folder / "checkpoints"), torch.device("npu"), report)
    return Counter((folder / "trace").read_text().split()[ends[1] : ends[2]])


def table(calls: Counter[str]) -> str:
    """The list as Markdown."""
    rows = sorted(calls.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"| {count} | {name.removeprefix('aclnn')} |" for name, count in rows]
    return "\n".join(["| calls | operator |", "|---:|---|", *lines, ""])


def main() -> None:
    text = README.read_text(encoding="utf-8")
    README.write_text(BLOCK.sub(lambda _: table(one_step()), text), encoding="utf-8")
    print(f"operators  {README}")


if __name__ == "__main__":
    main()
