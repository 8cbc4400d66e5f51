"""From documents to tokens: two libraries that agree on every id, and shards that hold every document."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from small_sources import PLAIN, SMALL, cleaned
from transformers import AutoTokenizer

from pipelines.encode import BOS, EOS, SPECIAL, encode, encoded, load_encoder, train_tokenizer
from pipelines.finetune import mark_assistant
from pipelines.params import Encode, UserError


def test_a_vocabulary_beyond_the_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"`encode.vocab_size` is 5000, but the text yields only \d+"):
        train_tokenizer(5000, ["just a few words"])


def test_other_ids_of_the_other_library_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned(tmp_path, SMALL, a=PLAIN)
    byte = tiktoken.Encoding(
        "bytes", pat_str=".", mergeable_ranks={bytes([n]): n for n in range(256)}, special_tokens={}
    )
    monkeypatch.setattr("pipelines.encode.load_encoder", lambda folder: byte)
    with pytest.raises(UserError, match="tokenizers and tiktoken give different ids"):
        encode(Encode(vocab_size=300), tmp_path / "clean", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_the_chat_template_is_what_finetuning_trains_on(corpus: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(corpus / "tokens")
    ours = load_encoder(corpus / "tokens")
    messages = [
        {"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "Good day\n"},
        {"role": "user", "content": "你好"}, {"role": "assistant", "content": "."},
    ]  # fmt: skip
    ids, marks = mark_assistant(messages, ours)
    assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False) == ids.tolist()
    assert ours.decode(ids[marks].tolist()) == f"Good day\n{SPECIAL[1]}.{SPECIAL[1]}"
    assert [ours.encode_single_token(token) for token in SPECIAL] == list(range(5))


@given(st.text())
def test_both_libraries_give_the_same_ids_for_anything(tokenizers, anything: str) -> None:
    ours, theirs = tokenizers
    ids = ours.encode_ordinary(anything)
    stored = [anything, f"{SPECIAL[0]}{anything}{SPECIAL[3]}"]
    for text, row in zip(stored, encoded(pd.Series(stored, dtype=object), ours), strict=True):
        assert row.tolist() == [BOS, *ours.encode_ordinary(text), EOS]
    assert ids == theirs(anything, add_special_tokens=False).input_ids
    assert ours.decode_bytes(ids) == anything.encode()


@pytest.fixture(scope="module")
def tokenizers(corpus: Path) -> tuple:
    return load_encoder(corpus / "tokens"), AutoTokenizer.from_pretrained(corpus / "tokens")


def test_both_libraries_give_the_same_ids_on_every_source(corpus: Path, tokenizers) -> None:
    ours, theirs = tokenizers
    table = pd.read_parquet(corpus / "clean/documents.parquet")
    talk = pd.read_parquet(corpus / "chat/dialogues.parquet")["messages"]
    texts = [*table["text"], *(" ".join(turn["content"] for turn in turns) for turns in talk)]
    expected = theirs(texts, add_special_tokens=False).input_ids
    assert len(texts) > 8000 and expected == ours.encode_ordinary_batch(texts)


def test_shards_hold_every_document_between_its_marks(corpus: Path, tmp_path: Path) -> None:
    encode(Encode(vocab_size=1000, shard_mib=1), corpus / "clean", tmp_path / "tokens")
    manifest = json.loads((tmp_path / "tokens/manifest.json").read_text())
    train = manifest["splits"]["train"]
    assert len(train["shards"]) > 5 and manifest["dtype"] == "uint16"
    encoder, table = load_encoder(tmp_path / "tokens"), pd.read_parquet(corpus / "clean/documents.parquet")
    texts = (
        (table["source"] + "/" + table["path"]).to_frame("name").assign(text=table["text"]).set_index("name")["text"]
    )
    count = 0
    for shard in train["shards"]:
        ids = np.fromfile(tmp_path / "tokens" / shard["file"], dtype=manifest["dtype"])
        assert len(ids) <= 2**19 and len(ids) == shard["offsets"][-1] == shard["tokens"]
        for name, start, end in zip(shard["documents"], shard["offsets"], shard["offsets"][1:], strict=False):
            assert ids[start] == 0 and ids[end - 1] == 1
            count += encoder.decode(ids[start + 1 : end - 1].tolist()) == texts[name]
    assert count == train["documents"] == (table["split"] == "train").sum()
