# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5 · Fine-tune, compare, talk to it
# From a model that continues text to one that answers; all weights or a few (LoRA); and which expert takes which token.

# %%
from pipelines import project

base, chat = project.model("base"), project.model("chat")
base, chat

# %% [markdown]
# ## Before and after
# The base model goes on writing, the chat model answers. Eleven million weights and four minutes of training catch the
# tone of Django's documentation, not its meaning.

# %%
print(base.generate("The `filter` method returns", max_new_tokens=48))

# %%
for question in ("What is AI?", "How are you?"):
    print(f"{question}\n  {chat.chat(question, max_new_tokens=32)}")

# %% [markdown]
# How well each foretells a text, in bits a byte: what fine-tuning forgot of code, and what it learnt of talk.

# %%
import pandas as pd

texts = ["def get_queryset(self):\n    return self.queryset.all()\n", "Hello! How are you? I am fine, thank you."]
scores = {name: model.score(texts)["bits_per_byte"] for name, model in (("base", base), ("chat", chat))}
pd.DataFrame(scores).assign(text=[text[:40] for text in texts]).set_index("text").round(2)

# %% [markdown]
# On all held-out text, beside what xz and a 5-gram model need:

# %%
from pathlib import Path

from pipelines import figures
from pipelines.stage import read_json

reports = [read_json(Path(f"reports/evaluate-{name}.json"), made_by="evaluate") for name in ("base", "chat")]
figures.bits(*reports)

# %% [markdown]
# ## All weights, or a few
# A short fine-tuning each. LoRA trains two thin matrices beside each large one, and merges them in the end.

# %%
full = project.run("finetune", steps=10, warmup_steps=2)

# %%
lora = project.run("finetune", steps=10, warmup_steps=2, method="lora", lora_rank=8, learning_rate=5e-3)

# %%
comparison = project.compare(full, lora)
losses = comparison.curves["finetune"].rename(columns={full.id: "all weights", lora.id: "LoRA"}).reset_index()
figures.lines(losses, ["all weights", "LoRA"], "loss of the assistant's tokens, nats")

# %%
comparison.metrics.filter(regex="loss|tokens_per_s", axis="index")

# %% [markdown]
# Any run is a model to talk to.

# %%
print(project.model(lora).chat("What is AI?", max_new_tokens=32))

# %% [markdown]
# ## Which expert took which token
# A colour is the expert with the greatest weight. The first layer goes by a fixed table, so equal tokens have equal
# colours there; the others look at what the token means here.

# %%
chat.experts("def save(self): return self.name  # the name of the model is saved, and its name is returned")

# %%
full.remove()
lora.remove()

# %% [markdown]
# Next: [review, promote, roll back](06_review.py).
