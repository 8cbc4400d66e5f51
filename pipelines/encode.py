"""Train a byte-level BPE tokenizer on the training documents and store all documents as token ids.

    python -m pipelines.encode          data/clean -> data/tokens

tokenizers trains the merges, tiktoken applies them: the same ids, several times faster. The folder holds tokenizer.json
and tokenizer_config.json (with the chat template) as transformers reads them, shards of ids, and manifest.json.
Every document is stored as BOS, its tokens, EOS.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipelines import stage
from pipelines.byte_level import BYTES
from pipelines.corpus import documents
from pipelines.params import Encode, UserError
from pipelines.tracking import Run

CLEAN, TOKENS = Path("data/clean"), Path("data/tokens")
SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>")
BOS, EOS, PAD, USER, ASSISTANT = range(len(SPECIAL))
# Words with their marks and the character before them, numbers up to three digits, punctuation, line ends, blanks.
PATTERN = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<｜Assistant｜>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
BATCH = 256  # documents encoded at a time


def encode(params: Encode, clean: Path, tokens: Path, run: Run | None = None) -> dict[str, Any]:
    """Write the folder `tokens` from `clean`/documents.parquet. Returns sizes; raises `UserError`."""
    table = documents(clean, ["text", "source", "path", "sha256", "bytes", "split"])
    train = table[table["split"] == "train"]
    tokenizer = train_tokenizer(params.vocab_size, train["text"])
    with stage.replacing(tokens) as fresh:
        fresh.mkdir()
        write_tokenizer(tokenizer, fresh)
        encoder = load_encoder(fresh)
        _require_same_ids(tokenizer, encoder, table)
        with stage.progress("encode", len(table)) as advance:
            splits = {
                split: _write_split(table[table["split"] == split], split, encoder, params, fresh, advance)
                for split in ("train", "heldout")
            }
        stage.write_json(fresh / "manifest.json", _manifest(table, params, fresh, splits))
    ratio = splits["heldout"]["bytes"] / splits["heldout"]["tokens"]
    stage.say(
        f"encode     {params.vocab_size:,} tokens in the vocabulary, {splits['train']['tokens'] / 1e6:.2f} M to train "
        f"on, {splits['heldout']['tokens'] / 1e6:.2f} M held out, {ratio:.2f} bytes a token"
    )
    sizes = {f"{split}_{key}": splits[split][key] for split in splits for key in ("tokens", "bytes", "documents")}
    return sizes | {"vocab_size": params.vocab_size, "bytes_per_token": ratio}


def train_tokenizer(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE with exactly `vocab_size` tokens; raises `UserError` when the text does not hold that many."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"params.yaml: `encode.vocab_size` is {vocab_size}, but the text yields only "
            f"{tokenizer.get_vocab_size()} different tokens; lower it to that, or add text."
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", pair=f"{SPECIAL[BOS]} $A $B", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return tokenizer


def load_encoder(folder: Path) -> tiktoken.Encoding:
    """tiktoken with the merges of `folder`/tokenizer.json: the same ids as the tokenizers library gives."""
    content = stage.read_json(folder / "tokenizer.json", made_by="encode")
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocabulary = {token: rank for token, rank in content["model"]["vocab"].items() if token not in special}
    ranks = {bytes(BYTES[character] for character in token): rank for token, rank in vocabulary.items()}
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    return tiktoken.Encoding("shovel", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    stage.write_json(folder / "tokenizer_config.json", settings)


def _require_same_ids(tokenizer: Tokenizer, encoder: tiktoken.Encoding, table: pd.DataFrame) -> None:
    """Both libraries must agree on the first documents of every source before one of them encodes the rest."""
    for text in table.groupby("source")["text"].head(4):
        if tokenizer.encode(text, add_special_tokens=False).ids != encoder.encode_ordinary(text):
            raise UserError(
                "tokenizers and tiktoken give different ids for the same text; install the versions that "
                "constraints.txt names and run again."
            )


def _write_split(
    table: pd.DataFrame, split: str, encoder: tiktoken.Encoding, params: Encode, folder: Path, advance: Any
) -> dict[str, Any]:
    """Shards of one split; a shard is closed when it is full, between two documents."""
    dtype = _dtype(params.vocab_size)
    shards: list[dict[str, Any]] = []
    for number, names, pieces in _shards(table, encoder, (params.shard_mib << 20) // dtype.itemsize, advance):
        ids = np.concatenate(pieces).astype(dtype).tobytes()
        file = folder / f"{split}-{number:05d}.bin"
        file.write_bytes(ids)
        offsets = np.cumsum([0, *map(len, pieces)]).tolist()
        digest = hashlib.sha256(ids).hexdigest()
        shards.append(
            {"file": file.name, "sha256": digest, "tokens": offsets[-1], "offsets": offsets, "documents": names}
        )
    tokens = sum(shard["tokens"] for shard in shards)
    return {"tokens": tokens, "bytes": int(table["bytes"].sum()), "documents": len(table), "shards": shards}


def _shards(
    table: pd.DataFrame, encoder: tiktoken.Encoding, capacity: int, advance: Any
) -> Iterator[tuple[int, list[str], list[np.ndarray]]]:
    """(number, names of the documents, their ids) of each shard of at most `capacity` ids, a longer document apart."""
    number, names, pieces, size = 0, [], [], 0
    for source, path, ids in zip(table["source"], table["path"], encoded(table["text"], encoder), strict=True):
        if pieces and size + len(ids) > capacity:
            yield number, names, pieces
            number, names, pieces, size = number + 1, [], [], 0
        names.append(f"{source}/{path}")
        pieces.append(ids)
        size += len(ids)
        advance()
    yield number, names, pieces


def encoded(texts: pd.Series, encoder: tiktoken.Encoding) -> Iterator[np.ndarray]:
    """BOS, the text's ids, EOS of every text in order, [n] uint32: tiktoken lets threads run side by side."""
    first, last = np.array([[BOS], [EOS]], np.uint32)

    def one(text: str) -> np.ndarray:
        return np.concatenate([first, encoder.encode_to_numpy(text, disallowed_special=()), last])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(texts), BATCH):
            yield from pool.map(one, texts.iloc[start : start + BATCH])


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _manifest(table: pd.DataFrame, params: Encode, folder: Path, splits: dict[str, Any]) -> dict[str, Any]:
    """The key is a digest of all that the ids depend on: text and its split, tokenizer, this code."""
    key = hashlib.sha256("".join(table["sha256"] + table["split"]).encode())
    key.update((folder / "tokenizer.json").read_bytes())
    key.update(Path(__file__).read_bytes())
    return {
        "key": key.hexdigest(),
        "dtype": _dtype(params.vocab_size).name,
        "vocab_size": params.vocab_size,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "splits": splits,
    }


if __name__ == "__main__":
    stage.main("encode", lambda params, run: encode(params.encode, CLEAN, TOKENS, run))
