"""Commands that let a model write."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipelines.commands import complete

Which = Annotated[
    str,
    typer.Option("--model", help="champion, a version, base, chat, a run, or a folder", autocompletion=complete.models),
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="at most so many tokens")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="the same seed writes the same")]


def chat(
    question: Annotated[str | None, typer.Argument(help="one question; a conversation when none is given")] = None,
    model: Which = "champion",
    tokens: Tokens = 128,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
) -> None:
    """Ask a model, or talk with it; an empty line or Ctrl-D ends a conversation.

    Examples: shovel chat "What is AI?"; shovel chat --model challenger
    """
    from pipelines import project

    answers = project.model(model)
    if question:
        typer.echo(answers.chat(question, tokens, temperature, seed=seed))
        return
    turns: list[dict[str, str]] = []
    while text := _ask():
        turns.append({"role": "user", "content": text})
        turns.append({"role": "assistant", "content": answers.chat(turns, tokens, temperature, seed=seed)})
        typer.echo(turns[-1]["content"])


def _ask() -> str:
    """The next line of the person, empty at the end."""
    typer.echo("> " if sys.stdin.isatty() else "", nl=False)
    return sys.stdin.readline().strip()


def generate(
    text: Annotated[str, typer.Argument(help="the model goes on from here")],
    model: Which = "base",
    tokens: Tokens = 64,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
) -> None:
    """Let a model continue a text.

    Example: shovel generate "def get_queryset(self):"
    """
    from pipelines import project

    typer.echo(text + project.model(model).generate(text, tokens, temperature, seed=seed))
