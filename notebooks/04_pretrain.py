# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · Pretrain and watch
# The training that `make demo` ran, looked at; then an idea tried from a cell, in a process and a folder of its own:
# `params.yaml` and `data/` stay as they are until you keep it.

# %%
from pipelines import project

project.stages()

# %% [markdown]
# ## The training that made your model
# Loss of every step, smoothed; and how evenly the experts were used on the way.

# %%
import pandas as pd

from pipelines import figures

curve = pd.read_csv("reports/plots/pretrain.csv")
figures.curve(curve)

# %%
figures.lines(curve, ["max_load_over_mean", "min_load_over_mean"], "tokens of an expert, over the mean")

# %% [markdown]
# ## An idea
# A dozen steps show how a learning rate starts. Any key of the stage's section may be named; an impossible value is
# refused in one sentence, before anything runs.

# %%
from pipelines.params import load_params

row = load_params().pretrain.sequence_length
short = {"steps": 12, "batch_tokens": 4 * row, "start_batch_tokens": 2 * row, "warmup_steps": 2}
try:
    project.run("pretrain", **short, learning_rate=-1.0)
except project.UserError as error:
    print(error)

# %%
first = project.run("pretrain", **short)

# %% [markdown]
# The second one is started and left alone; the cell is free at once. Closing the notebook or restarting the kernel does
# not end it. `project.watch()` finds whatever runs, a `dvc repro` in a terminal too; interrupting a cell that waits for
# a run ends the run, keeps its checkpoint, and the same call continues from there.

# %%
second = project.run("pretrain", **short, learning_rate=1e-3, wait=False)
second.status

# %%
_ = project.watch(second)

# %% [markdown]
# ## Which was better
# Parameters and figures that differ, and the losses side by side.

# %%
comparison = project.compare(first, second)
comparison.params

# %%
losses = comparison.curves["pretrain"].rename(columns={first.id: "as it is", second.id: "1e-3"}).reset_index()
figures.lines(losses, ["as it is", "1e-3"], "loss, nats a token")

# %%
project.runs().head(2)

# %% [markdown]
# Both are in MLflow too (the launcher, *MLflow*), with every step. A run that is worth it goes into the project with
# `project.keep(run)`, as in [notebook 6](06_review.py); these two are thrown away.

# %%
first.remove()
second.remove()

# %% [markdown]
# Next: [fine-tune it and talk to it](05_finetune.py).
