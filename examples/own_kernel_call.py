# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # The kernel by itself
# Fused attention in which keys count more or less, with torch alone: no model, no transformers.

# %%
import matplotlib.pyplot as plt
import torch

import atman_kernels as ak

torch.manual_seed(0)
heads, length, dim = 1, 12, 16
query, key = torch.randn(2, 1, heads, length, dim)
value = torch.eye(length).expand(1, heads, length, length)  # so that the output is the attention's weights

# %% [markdown]
# Token 4 removed, tokens 7 and 8 amplified. The rows still add up to one.

# %%
factor = torch.ones(1, length)
factor[0, 4], factor[0, 7:9] = 0.0, 4.0
plain = ak.suppressed_attention(query, key, value, is_causal=True)[0, 0]
modes = {mode: ak.suppressed_attention(query, key, value, factor, mode=mode, is_causal=True)[0, 0]
         for mode in ("log_additive", "multiplicative", "shifted")}  # fmt: skip
[round(float(weights.sum(-1).min()), 4) for weights in modes.values()]

# %% [markdown]
# A pack: three variants of the sequence, each without another token, as one call over the shared keys. Each brings
# only the
# rows from its token on.

# %%
q, k, v = (torch.randn(2, length, dim) for _ in range(3))  # (heads, tokens, dim) of the base run
starts = [3, 6, 9]
pack = ak.VariantPack.build(suffix_lengths=[length - s for s in starts], prefix_lengths=starts)
factors = torch.ones(3, length)
factors[range(3), starts] = 0.0
rows = pack.row_position
output = ak.packed_suppressed_attention(q[:, rows], k[:, rows], v[:, rows], k, v, pack, factors)
whole = ak.suppressed_attention(q[None], k[None], v[None], factors[1:2], is_causal=True)[0]
second = output[:, pack.suffix_starts[1] : pack.suffix_starts[2]]
print(
    f"{pack.num_rows} rows instead of {3 * length}; largest difference {float((second - whole[:, 6:]).abs().max()):.1e}"
)

# %% [markdown]
# The weights: as they are, and under the factors in each mode. A removed key has a weight of 0 in the default mode;
# the others
# scale scores, so a factor of 0 makes a key average (multiplicative) or least of its row (shifted).

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3.8), sharey=True)
for place, (name, weights) in zip(axes, {"plain": plain, **modes}.items(), strict=True):
    place.imshow(weights, cmap="viridis", vmin=0, vmax=1)
    place.set_title(name)
    place.set_xlabel("key")
    place.set_xticks([4, 7, 8])
axes[0].set_ylabel("query")
figure.tight_layout()
