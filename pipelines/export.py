"""Export the chat model in Hugging Face layout, with its model card, and prove that transformers computes the same.

    python -m pipelines.export          data/models/chat -> data/models/release

The folder is loaded by transformers' own class; next-token logits on held-out text must agree, or the stage fails and
the folder of before stays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from model.hf import save_pretrained
from model.transformer import MoETransformer
from pipelines import card, models, stage
from pipelines.corpus import in_turn
from pipelines.encode import BOS, load_encoder
from pipelines.machine import environment
from pipelines.params import Params, UserError
from pipelines.tracking import Run

CHAT_MODEL, RELEASE = Path("data/models/chat"), Path("data/models/release")
CLEAN, CHAT, REPORTS = Path("data/clean"), Path("data/chat"), Path("reports")
TEXTS, TOKENS = 8, 256  # held-out documents compared, tokens of each


def export(
    params: Params, tuned: Path, clean: Path, chat: Path, reports: Path, release: Path, run: Run
) -> dict[str, Any]:
    """Write `release` from `tuned`; raises `UserError` when transformers' logits differ by more than the limit.

    clean, chat, reports: what the model card says of data and metrics.
    """
    limit = params.export.max_logit_difference
    environment.require_passport(torch.device("cpu"))
    run.tag(**environment.tags(torch.device("cpu")))
    net = models.load(tuned, made_by="finetune")
    with stage.replacing(release) as fresh:
        save_pretrained(net, fresh, tokenizer=tuned)
        settings = {
            "bos_token_id": net.config.bos_token_id,
            "eos_token_id": net.config.eos_token_id,
            "do_sample": False,
        }
        (fresh / "generation_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        card.write(fresh, params, net.config, clean, chat, reports)
        difference, agreement = compare(net, fresh, _samples(tuned, clean))
        if not difference <= limit:
            raise UserError(
                f"transformers computes other logits from the exported folder: they differ by {difference:.2e}, the "
                f"limit `export.max_logit_difference` is {limit:.0e}; nothing was exported."
            )
    stage.say(f"export     transformers agrees: logits differ by {difference:.1e} (limit {limit:.0e})")
    return {
        "passed": True,
        "max_logit_difference": difference,
        "limit": limit,
        "top1_agreement": agreement,
    }


def compare(net: MoETransformer, folder: Path, samples: list[torch.Tensor]) -> tuple[float, float]:
    """(largest |ours - theirs| of the logits in fp32, share of positions with the same best token)."""
    from transformers import AutoModelForCausalLM, logging  # four seconds of import

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    differences, agreements = [], []
    with torch.no_grad():
        for ids in samples:
            a, b = net(ids).logits, theirs(ids).logits.float()
            differences.append((a - b).abs().max().item())
            agreements.append((a.argmax(-1) == b.argmax(-1)).float().mean().item())
    return max(differences), sum(agreements) / len(agreements)


def _samples(tokenizer: Path, clean: Path) -> list[torch.Tensor]:
    """Token ids [1, n] of held-out documents."""
    encoder = load_encoder(tokenizer)
    texts = [text for text, _ in in_turn(clean, TEXTS)]
    return [torch.tensor([[BOS, *encoder.encode_ordinary(text)[: TOKENS - 1]]]) for text in texts]


if __name__ == "__main__":
    stage.main("export", lambda params, run: export(params, CHAT_MODEL, CLEAN, CHAT, REPORTS, RELEASE, run))
