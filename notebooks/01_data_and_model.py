# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The data, the tokenizer and the model
# What the pipeline made, looked at with the functions that made it. Run `make demo` first.
# The working directory of every cell is the repository's root, as for the stages.

# %%
import os
from pathlib import Path

while not Path("dvc.yaml").exists():
    os.chdir("..")

# %% [markdown]
# ## Documents
# One row a document. The split is a function of the document's hash.

# %%
from pipelines.corpus import documents

table = documents(Path("data/clean"), ["source", "language", "licence", "bytes", "split", "text"])
table.groupby(["source", "split"])["bytes"].agg(["count", "sum"])

# %%
print(table["text"].sample(1, random_state=0).iloc[0][:800])

# %% [markdown]
# ## Tokens
# tiktoken applies the merges that the pipeline learnt.

# %%
from pipelines.encode import load_encoder

encoder = load_encoder(Path("data/tokens"))
[encoder.decode([token]) for token in encoder.encode_ordinary("def get_queryset(self):\n    return self.queryset")]

# %% [markdown]
# ## Loss
# What `dvc plots` draws, as a table and a line.

# %%
import pandas as pd

curve = pd.read_csv("reports/plots/pretrain.csv").set_index("step")
curve["loss"].plot(xlabel="step", ylabel="loss, nats a token", grid=True)
# %% [markdown]
# ## Writing
# The base model continues a text; greedy at temperature 0.

# %%
import torch

from model import generate, load_pretrained

net = load_pretrained("data/models/base")
start = torch.tensor([[0, *encoder.encode_ordinary("The `filter` method returns")]])
ids = generate(net, start, max_new_tokens=64, temperature=0.7, top_p=0.9, seed=1)
print(encoder.decode(ids[0, 1:].tolist()))

# %% [markdown]
# ## An idea
# Any parameter can be tried without a new commit; the run shows up in MLflow (`make ui`) as an experiment:
# `dvc exp run -S finetune.learning_rate=1e-3`, then `dvc exp show`.
