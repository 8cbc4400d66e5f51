# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · The tokenizer
# A byte-level BPE learnt from the training documents. What a token stands for decides what a language costs: text that
# needs twice as many tokens is twice as slow to train on and to serve.

# %% [markdown]
# ## Pieces
# The tokenizers library learnt the merges, tiktoken applies them; both give the same ids.

# %%
from pathlib import Path

from pipelines.encode import load_encoder
from pipelines.repository import enter

enter()  # paths start at the repository's root
encoder = load_encoder(Path("data/tokens"))
ids = encoder.encode_ordinary("def get_queryset(self):\n    return 12345")
print("|".join(encoder.decode([token]) for token in ids))

# %% [markdown]
# A word in a language that the text hardly holds falls apart into bytes; no text is ever unknown.

# %%
for word in ("translation", "Übersetzung", "перевод", "翻译", "🙂"):
    ids = encoder.encode_ordinary(word)
    print(f"{len(word.encode()):3} bytes {len(ids):3} tokens   {word}")

# %% [markdown]
# ## What a language costs
# Bytes a token on the documents that were held out. The scripts of India and East Asia take three bytes a letter, so
# compare a language with its own raw text, not with English.

# %%
from pipelines import figures
from pipelines.corpus import documents
from pipelines.notebooks.fertility import by_vocabulary, fertility

table = documents(Path("data/clean"), ["text", "source", "language", "bytes", "split"])
heldout = table[table["split"] == "heldout"]
by_language = fertility(encoder, heldout)
figures.fertility(by_language)

# %%
fertility(encoder, heldout, "source").round(2).style.hide(axis="index").format(precision=2, thousands=",")

# %% [markdown]
# ## What another vocabulary would give
# Four tokenizers, learnt here from a sample of the training text. Each doubling buys less, and makes the embedding and
# the head of the model larger: a small model wants a small vocabulary.

# %%
shuffled = table[table["split"] == "train"].sample(frac=1, random_state=0)
sample = shuffled[shuffled["bytes"].cumsum() < 1_000_000]["text"].tolist()
some = heldout.sample(min(len(heldout), 100), random_state=0)
figures.vocabulary(by_vocabulary((512, 1024, 2048, 4096), sample, some))

# %% [markdown]
# To use another one: `encode.vocab_size` in `params.yaml`, then `shovel run`. Everything from the tokens on runs again.
# Next: [the architecture by hand](03_architecture.py).
