# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · The architecture by hand
# One DeepSeek-V4 layer of the model that you trained, taken apart: hyper-connections, compressed attention with its
# indexer, and the mixture of experts. At the end the parts, put together by hand, give what the layer itself gives.

# %% [markdown]
# ## A text on its way through the model
# A held-out document goes through the layers before the one that we open: the first with sparse attention. The state is
# not one vector a token but `hc_mult` of them, the residual streams.

# %%
from pathlib import Path

import torch

from model import load_pretrained
from model.config import HEAVY, SLIDING, SPARSE
from model.context import Context
from pipelines.corpus import documents
from pipelines.encode import BOS, load_encoder
from pipelines.repository import enter

enter()  # paths start at the repository's root
torch.set_grad_enabled(False)
net, encoder = load_pretrained("data/models/base"), load_encoder(Path("data/models/base"))
config = net.config
table = documents(Path("data/clean"), ["text", "source", "split", "bytes"])
text = table[(table["split"] == "heldout") & (table["bytes"] > 4000)].iloc[0]["text"]
ids = torch.tensor([[BOS, *encoder.encode_ordinary(text)][: 8 * config.sliding_window]])
tokens = [encoder.decode([token]) for token in ids[0].tolist()]
print("".join(tokens[1:80]))

# %%
layer = config.layer_types.index(SPARSE)
block, context = net.model.layers[layer], Context(config, ids)
x = net.model.embed_tokens(ids).unsqueeze(2).expand(-1, -1, config.hc_mult, -1)
for number in range(layer):
    x = net.model.layers[number](x, context, f"layer {number}")
dict(layer=layer, attention=config.layer_types[layer], shape=tuple(x.shape), axes="rows, tokens, streams, channels")

# %% [markdown]
# ## Hyper-connections
# Before attention the streams are read as a weighted sum; after it the result is written to each with a weight, and the
# streams are mixed. The mixing matrix is doubly stochastic, rows and columns sum to 1, so the state neither grows nor
# fades with depth. Sinkhorn's iterations make it so: columns exactly, rows up to what is shown on the right, for the
# worst of all tokens ([paper](https://arxiv.org/abs/2512.24880), section 4).

# %%
from model.anatomy import sinkhorn_errors, stream_weights
from pipelines import figures

weights = stream_weights(block.attn_hc, x)
errors = sinkhorn_errors(weights, config.hc_sinkhorn_iters, config.hc_eps)
figures.streams(weights.read_SN.numpy(), weights.write_SN.numpy(), weights.mix_SNN.numpy(), errors)

# %% [markdown]
# ## What a token may look at
# Every layer sees a window of raw tokens. Sparse layers (CSA) add one entry for every few tokens, of which an indexer
# chooses; heavily compressed layers (HCA) add one for many tokens, and see all of them.

# %%
from model.anatomy import attention_parts, recall

h, write = block.attn_hc(x, context)
h = block.input_layernorm(h)
parts = attention_parts(block.self_attn, h, context)
kinds = [kind for kind in (SLIDING, SPARSE, HEAVY) if kind in config.layer_types]
others = {kind: net.model.layers[config.layer_types.index(kind)].self_attn for kind in kinds}
figures.reach({kind: attention_parts(other, h, context) for kind, other in others.items()})

# %% [markdown]
# ## What it does look at
# One key of a token serves all heads, and is the value as well. What the sink takes goes nowhere: a head may also look
# at nothing.

# %%
figures.attention(parts)

# %% [markdown]
# ## The indexer
# It scores every entry for every token, cheaply, and attention goes to the best alone. Right: how much of what dense
# attention would give to the entries lies on the chosen ones. Early tokens have so few entries that all are chosen.

# %%
dense = attention_parts(block.self_attn, h, Context(config, ids, sparse=False))
kept = recall(dense, config.index_topk)
seen = parts.visible_ST[-1]
last = (values[-1][seen].numpy() for values in (dense.far_ST, parts.scores_ST, parts.chosen_ST))
figures.indexer(*last, kept[dense.visible_ST.any(dim=1)].numpy())

# %% [markdown]
# ## Routing
# The router gives each token an affinity to each expert, and the best few take it. A bias, not a loss, keeps the
# experts busy: it changes who is chosen, not with which weight.

# %%
y = write(block.self_attn(h, context, "by hand"))
f, write = block.ffn_hc(y, context)
f = block.post_attention_layernorm(f)
experts, gates, affinities = block.mlp.gate(f[0], ids[0])
shown = slice(20, 70)
figures.routing(tokens[shown], experts[shown].numpy(), gates[shown].numpy(), config.n_routed_experts)

# %% [markdown]
# What each expert computes is a gated two-layer network. Here they are one by one; in training one grouped product does
# them all.

# %%
from torch.nn import functional as F

routed, limit, stacked = torch.zeros_like(f[0]), config.swiglu_limit, block.mlp.experts
for expert in range(config.n_routed_experts):
    token, place = (experts == expert).nonzero(as_tuple=True)
    gate, up = F.linear(f[0, token], stacked.gate_up_proj[expert]).chunk(2, dim=-1)
    hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    routed.index_add_(0, token, F.linear(hidden, stacked.down_proj[expert]) * gates[token, place, None])
out = write(block.mlp.shared_experts(f, context) + routed)

# %% [markdown]
# ## The same
# By hand, and as the model does it: the largest difference of any number.

# %%
theirs = block(x, Context(config, ids), "layer")
torch.testing.assert_close(out, theirs, rtol=1e-4, atol=1e-4)
print(f"{float((out - theirs).abs().max()):.1e}, of numbers up to {float(theirs.abs().max()):.1f}")

# %% [markdown]
# ## Who is busy
# Over a whole text, all layers: white is an equal share. The first layer's experts are named by a fixed table.

# %%
load = net(ids).expert_load.double()
figures.load({f"layer {number}": (row / row.sum()).tolist() for number, row in enumerate(load)})

# %% [markdown]
# Where it is written: `model/block.py` is this page in ten lines; `model/hyper_connections.py`,
# `model/compressed_attention.py` and `model/moe.py` are its parts. Next: [training it](04_pretrain.py).
