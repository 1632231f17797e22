# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Sets of units
# Two sentences of this prompt say the same. Either can be missed, so neither gets a score when suppressed alone;
# both together
# cannot.

# %%
import matplotlib.pyplot as plt
import torch

import atman_kernels as ak

model, tokenizer = ak.load_model("smollm2", dtype="float32")
explainer = ak.Explainer(model, tokenizer, progress=False)
sentences = [
    "The café opens at nine.",
    "Milo Serra runs the café.",
    "The pool is heated in winter.",
    "The owner of the café is Milo Serra.",
    "Tickets cost six crowns.",
]
prompt, spans = "", []
for sentence in sentences:
    spans.append((len(prompt), len(prompt) + len(sentence)))
    prompt += sentence + " "
prompt += "\nQuestion: Who runs the café?\nAnswer:"
target = " Milo Serra"

# %% [markdown]
# Every pair of sentences, suppressed together: the rise of the answer's loss, on the diagonal each sentence alone.

# %%
count = len(sentences)
pairs = [(i, j) for i in range(count) for j in range(i, count)]
masks = torch.zeros(len(pairs), count, dtype=torch.bool)
for row, pair in enumerate(pairs):
    masks[row, list(pair)] = True
rises = explainer.ablate(prompt, target, units=spans, masks=masks).rises.sum(1)
table = torch.zeros(count, count)
for (i, j), rise in zip(pairs, rises, strict=True):
    table[i, j] = table[j, i] = rise
table.round(decimals=1)

# %% [markdown]
# Three ways to give each sentence one number: alone (AtMan), its mean over orders of all (Shapley, with standard
# errors), its
# weight in a sparse linear model over random halves (Lasso).

# %%
alone = explainer.explain(prompt, target, units=spans)
shapley = explainer.explain(prompt, target, units=spans, method="shapley", permutations=16)
lasso = explainer.explain(prompt, target, units=spans, method="lasso", samples=64)

figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.8))
image = left.imshow(table, cmap="Oranges")
left.set_xticks(range(count), range(1, count + 1))
left.set_yticks(range(count), [f"{i} {text}" for i, text in enumerate(sentences, 1)])
left.set_title("both suppressed: rise of the loss, in nats")
figure.colorbar(image, ax=left)
places = torch.arange(count)
right.bar(places - 0.27, alone.total, 0.25, label="alone (AtMan)")
right.bar(places, shapley.total, 0.25, yerr=shapley.standard_errors, label="Shapley")
right.bar(places + 0.27, lasso.total, 0.25, label="Lasso")
right.set_xticks(places, [str(i) for i in range(1, count + 1)])
right.set_xlabel("sentence")
right.set_ylabel("nats")
right.legend()
figure.tight_layout()
