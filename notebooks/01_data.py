# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1 · The data and its contracts
# What the model reads, what was thrown away and why, and what stops a training before it starts. Then a source of your
# own, in a temporary folder: it breaks a contract, is mended, and passes. Run `make demo` first.

# %% [markdown]
# ## What is there
# One row a document. A document is held out by its hash, so it never changes sides when more text comes.

# %%
import os
from pathlib import Path

from pipelines import figures
from pipelines.corpus import documents
from pipelines.repository import enter

enter()  # paths start at the repository's root

table = documents(Path("data/clean"), ["source", "language", "licence", "path", "bytes", "split", "text"])
figures.sizes(table)

# %%
table.groupby(["source", "licence"]).agg(documents=("text", "size"), languages=("language", "nunique"))

# %%
document = table[table["bytes"] > 600].iloc[0]
print(f"{document['source']}: {document['path']}\n\n{document['text'][:600]}")

# %% [markdown]
# ## What was dropped
# Cleaning counts a reason for each document that it drops.

# %%
from pipelines.stage import read_json

profile = read_json(Path("data/clean/profile.json"), made_by="clean")
figures.dropped(profile["sources"])

# %% [markdown]
# ## What was promised
# Every line is an expectation that Great Expectations checked before the tokenizer and the model saw the text.

# %%
import pandas as pd

report = read_json(Path("reports/contracts.json"), made_by="contracts")
columns = {"suite": "about", "what": "contract", "observed": "found", "limit": "limit", "success": "holds"}
table = pd.DataFrame(report["expectations"])[list(columns)].rename(columns=columns)
table.style.hide(axis="index").set_properties(**{"text-align": "left"})

# %% [markdown]
# ## A source of your own
# Text goes into `data/own`, and an entry into `data/sources.yaml`. Here both are in a temporary folder, and your data
# stays as it is: twelve letters, each signed with an e-mail address.

# %%
import tempfile

from pipelines.params import load_params

params = load_params()
os.chdir(tempfile.mkdtemp())
letters = Path("data/own/letters")
letters.mkdir(parents=True)
for number in range(12):
    body = f"Letter {number}\n\n" + f"Dear reader {number}, shovel number {number} is on its way. " * 8
    _ = (letters / f"{number:02}.txt").write_text(f"{body}\n\nAda {number} <ada.{number}@example.org>\n")

# %%
from ruamel.yaml import YAML

entry = {"name": "letters", "kind": "path", "path": "data/own/letters", "files": ["*.txt"]}
entry |= {"licence": "CC-BY-4.0", "language": "en", "use": "pretrain"}
sources = Path("data/sources.yaml")
YAML().dump({"sources": [entry]}, sources)
print(sources.read_text())

# %% [markdown]
# The stages are functions of parameters and folders; these two are the ones that `dvc repro` runs. Half of so few
# documents is held out, and for once a corpus of ten will do.

# %%
from pipelines.clean import CHAT, CLEAN, RAW, clean
from pipelines.fetch import fetch

cleaning = params.clean.model_copy(update={"heldout_percent": 49.0})
contract = params.contracts.model_copy(update={"min_documents": 10, "max_overlap_rate": 1.0})
_ = fetch(params.fetch, sources, RAW, Path(".downloads"))
_ = clean(cleaning, RAW, CLEAN, CHAT)

# %% [markdown]
# More than a few documents with an address break a contract. The sentence says which one, how badly and what to do; the
# page that it names shows all of them.

# %%
from pipelines.contracts import ACCEPTED, FAILED, PAGE, contracts
from pipelines.params import UserError

try:
    contracts(contract, CLEAN, CHAT, ACCEPTED, PAGE, FAILED)
except UserError as error:
    print(error)

# %% [markdown]
# Mended at the source: the signatures go, and every contract holds.

# %%
for letter in letters.iterdir():
    letter.write_text(letter.read_text().partition("\n\nAda")[0])
_ = fetch(params.fetch, sources, RAW, Path(".downloads"))
_ = clean(cleaning, RAW, CLEAN, CHAT)
held = contracts(contract, CLEAN, CHAT, ACCEPTED, PAGE, FAILED)

# %% [markdown]
# In your project it is the same: text into `data/own`, an entry into `data/sources.yaml`, `shovel check`, `shovel run`.
# `shovel accept` makes the present data the profile that later data is compared with.
# Next: [how text becomes tokens](02_tokenizer.py).
