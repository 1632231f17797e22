# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # One question, ten methods
# A question of SQuAD's kind. The answer stands in one place of the passage, so one can see which method finds it.
# Set the
# environment variable `SQUAD` to a file in SQuAD's format to take a question from it.

# %%
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np

import atman_kernels as ak
from atman_kernels.evaluation.squad import read_items

passage = (
    "The Dorn is a river in the north of Valland. It rises in the Hesk mountains at 1,240 metres, and reaches the sea "
    "at Port Anselm. In 1911 Ilse Brandt built the first bridge across it."
)
question, answer = "Who built the first bridge across the Dorn?", "Ilse Brandt"
if os.environ.get("SQUAD"):
    item = min(read_items(os.environ["SQUAD"]), key=lambda item: len(item.context))
    passage, question, answer = item.context, item.question, item.answers[0]
prompt = f"{passage}\nQuestion: {question}\nAnswer:"

# %%
model, tokenizer = ak.load_model("smollm2", dtype="float32")
explainer = ak.Explainer(model, tokenizer, progress=False)
OPTIONS = {
    "atman": {},
    "lasso": {"samples": 48},
    "attnlrp": {"whole_answer": True},
    "integrated_gradients": {"steps": 8, "whole_answer": True},
    "input_x_gradient": {"whole_answer": True},
    "chefer": {},
    "gradcam": {},
    "rollout": {},
    "raw_attention": {},
    "random": {},
}
found = {}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # integrated gradients do not converge on this model, and say so
    for method, options in OPTIONS.items():
        found[method] = explainer.explain(prompt, f" {answer}", units="word", method=method, **options)

# %% [markdown]
# The five strongest words of each. Scores of different methods are not in the same unit; `measure` says in which.

# %%
for method, explanation in found.items():
    print(f"{method:21}", ", ".join(unit.text for unit, score in explanation.top(5)), "|", explanation.measure)

# %% [markdown]
# All words of the prompt, one row per method, each row scaled to its largest score. The words of the answer are framed.

# %%
units = found["atman"].units
start = passage.find(answer)
truth = [i for i, unit in enumerate(units) if start <= unit.start < start + len(answer)]
rows = np.stack([explanation.total.numpy() / explanation.total.abs().max().item() for explanation in found.values()])
figure, axes = plt.subplots(figsize=(15, 4.6))
axes.imshow(rows, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
axes.set_yticks(range(len(found)), list(found))
axes.set_xticks(range(len(units)), [unit.text for unit in units], rotation=90, fontsize=8, parse_math=False)
for index in truth:
    axes.add_patch(plt.Rectangle((index - 0.5, -0.5), 1, len(found), fill=False, edgecolor="black"))
figure.tight_layout()
