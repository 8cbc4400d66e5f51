"""Train = export = serve: the same prompts through the trained module, transformers and the server that answers people.

    python -m pipelines.agreement       data/models/chat, data/models/release -> reports/agreement.json

Prompts are held-out documents of several languages, cut to several lengths, and held-out dialogues in chat format. At
every position the log-probabilities of the next token are compared with those of the module as it was trained: over the
K most likely tokens and the rest as one, so KL is in nats and never above that of the whole distribution. The server is
asked over HTTP and writes a few tokens more, so that decoding with a cache counts too. Limits: section `agreement` of
params.yaml, by the type in which the exported weights are. The stage reports; the gate of the promotion decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from torch import Tensor

from model.transformer import MoETransformer
from pipelines import gates, models, stage
from pipelines.corpus import dialogues, in_turn
from pipelines.deployment import endpoint
from pipelines.encode import BOS, load_encoder
from pipelines.finetune import mark_assistant
from pipelines.machine import environment
from pipelines.params import WRITTEN, Agreement
from pipelines.tracking import Run

TUNED, RELEASE = Path("data/models/chat"), Path("data/models/release")
CLEAN, CHAT = Path("data/clean"), Path("data/chat")


@dataclass(frozen=True)
class Prompt:
    """Token ids of a held-out text: a document in some language, or a dialogue up to the assistant's turn."""

    kind: str
    language: str
    ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What one of the three says of a prompt: the tokens, those that it wrote itself included, and at each position
    but the last the ids of the most likely next tokens and their log-probabilities, best first: [S - 1, K] both."""

    ids: list[int]
    tokens_SK: Tensor
    logp_SK: Tensor


def agreement(
    params: Agreement,
    tuned: Path,
    release: Path,
    clean: Path,
    chat: Path,
    run: Run | None = None,
    served: Path | None = None,
) -> dict[str, Any]:
    """Distances of transformers and of the server from the module in `tuned`.

    served: the folder that the server gets, where it is not `release` but a copy to be tried. Raises `UserError`.
    """
    if run:
        run.tag(**environment.tags(torch.device("cpu")))
    net = models.load(tuned, made_by="finetune")
    chosen = prompts(params, tuned, clean, chat)
    dtype = json.loads((release / "config.json").read_text(encoding="utf-8"))["dtype"]
    limits = params.limits(dtype)
    report = {"dtype": dtype, "limits": limits.model_dump(), "prompts": len(chosen)}
    report |= {"languages": sorted({p.language for p in chosen}), "lengths": sorted({len(p.ids) for p in chosen})}
    legs = {"transformers": (by_transformers, release), "server": (by_server, served or release)}
    with ThreadPoolExecutor() as pool:  # the server, another process, starts and answers while transformers is loaded
        jobs = {name: pool.submit(*leg, chosen, params.top_tokens) for name, leg in legs.items()}
    for name in legs:
        report[name] = compare(net, jobs[name].result())
        verdict = "agrees" if gates.agrees(report[name], report["limits"]) else "DIFFERS"
        stage.say(f"agreement  {name} {verdict}: {gates.distances(report[name])}")
    return report


def prompts(params: Agreement, tokenizer: Path, clean: Path, chat: Path) -> list[Prompt]:
    """Held-out documents, one language after the other, lengths in turn; then held-out dialogues."""
    encoder = load_encoder(tokenizer)
    lengths = params.lengths
    found = [
        Prompt("document", language, [BOS, *encoder.encode_ordinary(text)][: lengths[n % len(lengths)]])
        for n, (text, language) in enumerate(in_turn(clean, params.documents))
    ]
    table = dialogues(chat, ["messages", "language", "sha256", "split"])
    heldout = table[table["split"] == "heldout"].sort_values("sha256").head(params.dialogues)
    for messages, language in zip(heldout["messages"], heldout["language"], strict=True):
        ids, marks = mark_assistant(messages, encoder)
        found.append(Prompt("dialogue", language, ids[: marks.argmax()][: max(lengths)].tolist()))
    return found


def by_transformers(folder: Path, chosen: list[Prompt], top: int) -> list[Answer]:
    """What transformers' own class says, in float32."""
    from transformers import AutoModelForCausalLM, logging  # four seconds of import

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    answers = []
    for prompt in chosen:
        with torch.no_grad():
            logp_SV = theirs(torch.tensor([prompt.ids])).logits[0, :-1].float().log_softmax(-1)
        best = logp_SV.topk(min(top, logp_SV.shape[1]))
        answers.append(Answer(prompt.ids, best.indices, best.values))
    return answers


def by_server(folder: Path, chosen: list[Prompt], top: int) -> list[Answer]:
    """What the server says over HTTP: of the prompt, and of the tokens that it then writes with its cache."""
    with endpoint.serving(folder) as address:
        return [_asked(address, folder.name, prompt, top) for prompt in chosen]


def _asked(address: str, name: str, prompt: Prompt, top: int) -> Answer:
    body = {"model": name, "prompt": prompt.ids, "max_tokens": WRITTEN, "temperature": 0, "echo": True}
    body |= {"logprobs": top, "return_tokens_as_token_ids": True}
    done = requests.post(f"{address}/v1/completions", json=body, timeout=300)
    done.raise_for_status()
    scored = done.json()["choices"][0]["logprobs"]
    best = [sorted(place.items(), key=lambda entry: -entry[1]) for place in scored["top_logprobs"][1:]]
    tokens_SK = torch.tensor([[_id(token) for token, _ in place] for place in best])
    logp_SK = torch.tensor([[logp for _, logp in place] for place in best])
    return Answer([_id(token) for token in scored["tokens"]], tokens_SK, logp_SK)


def _id(token: str) -> int:
    """Of `token_id:17`."""
    return int(token.removeprefix("token_id:"))


def compare(net: MoETransformer, answers: Iterable[Answer]) -> dict[str, float]:
    """Mean KL in nats of the module from the answers, share of equal best tokens, largest |difference| of log p."""
    rows = [_distances(net, answer) for answer in answers]
    kl_P, same_P, difference_P = (torch.cat(column) for column in zip(*rows, strict=True))
    return {
        "kl": kl_P.mean().item(),
        "top1_agreement": same_P.double().mean().item(),
        "difference": difference_P.max().item(),
        "positions": len(kl_P),
    }


def _distances(net: MoETransformer, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
    """(KL, whether the best token is the same, largest difference) at each position of one prompt, [S - 1] each."""
    with torch.no_grad():
        logp_SV = net(torch.tensor([answer.ids])).logits[0, :-1].double().log_softmax(-1)
    ours_SK, theirs_SK = logp_SV.gather(1, answer.tokens_SK), answer.logp_SK.double()
    p_SK, q_SK = (_with_rest(ours_SK.exp()), _with_rest(theirs_SK.exp()))
    kl_S = (p_SK * (p_SK / q_SK).log()).sum(-1).clamp(min=0)
    return kl_S, answer.tokens_SK[:, 0] == logp_SV.argmax(-1), (ours_SK - theirs_SK).abs().amax(-1)


def _with_rest(p_SK: Tensor) -> Tensor:
    """Probabilities of the most likely tokens and of all others together."""
    return torch.cat([p_SK, 1 - p_SK.sum(-1, keepdim=True)], dim=-1).clamp(min=1e-12)


if __name__ == "__main__":
    stage.main("agreement", lambda params, run: agreement(params.agreement, TUNED, RELEASE, CLEAN, CHAT, run))
