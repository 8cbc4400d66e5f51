# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6 · Review, promote, roll back
# The way from an idea to a live version and back, rehearsed on a copy of this project with an empty registry: the
# commands are the real ones, and nothing of yours changes.

# %%
from pipelines import project
from pipelines.notebooks.rehearsal import rehearse

print(rehearse())

# %% [markdown]
# ## The first version
# `propose` gives the exported model a number and a digest. The review lists every condition of a promotion, and shows
# the page on which a person decides: scroll in it.

# %%
first = project.propose()
first

# %%
project.review(first.version)

# %%
project.promote()

# %% [markdown]
# ## An idea, kept
# A fine-tuning with another learning rate and everything that follows from it, up to the review page. Only what depends
# on the change runs. In the rehearsal the bar is low: a few steps may be worse than the champion.

# %%
change = {"steps": 8, "warmup_steps": 2, "learning_rate": 1e-3}
run = project.run("review", upto=True, finetune=change, register={"margin_bits_per_byte": 2.0})

# %%
project.compare("workspace", run).params

# %% [markdown]
# Keeping it writes those lines into `params.yaml` and puts the results in place: nothing is stale afterwards, so
# `dvc repro` has nothing to train.

# %%
project.keep(run)

# %%
project.stages()["state"].value_counts()

# %% [markdown]
# ## The second version
# What is not committed cannot go live, because nobody could make it again. After the commit, proposing signs the same
# version with it.

# %%
second = project.propose(run)
try:
    project.promote()
except project.UserError as error:
    print(error)

# %%
import subprocess

_ = subprocess.run("git add -A && git commit --quiet -m 'Fine-tune with 1e-3'", shell=True, check=True)
project.propose(run)
project.promote()

# %% [markdown]
# ## And back
# The two change places. Every move leaves a record with the gates and the lineage, for git to keep.

# %%
project.rollback()

# %%
import json
from pathlib import Path

import pandas as pd

records = [json.loads(path.read_text()) for path in Path("reports/releases").glob("*.json")]
columns = ["at", "action", "version", "replaces", "by"]
pd.DataFrame(records)[columns].sort_values("at").style.hide(axis="index").format(na_rep="", precision=0)

# %% [markdown]
# In your project the same calls act on your registry; the commands are `shovel propose`, `shovel review`,
# `shovel promote` and `shovel rollback`. `shovel serve` then serves the champion.
