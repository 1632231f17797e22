# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Steering
# A sentence of the prompt, turned down and up while the model answers. A factor c multiplies the weight of the
# sentence's keys
# in every softmax; 0 removes them, 1 leaves the model as it is.

# %%
import matplotlib.pyplot as plt
import torch
from IPython.display import HTML

import atman_kernels as ak

model, tokenizer = ak.load_model("smollm2", dtype="float32")
prompt = "Our dog is called Pilot and our cat is called Minka. What is the name of our pet?"
span = "cat is called Minka"

# %%
factors = [0.0, 0.1, 0.5, 1.0, 4.0]
answers = []
for factor in factors:
    with ak.steer(model, tokenizer, prompt, {span: factor}, chat=True) as steered:
        (answer,) = steered.generate(max_new_tokens=20, do_sample=False)
    answers.append(answer)

# %% [markdown]
# How likely does each name become as the beginning of an answer?

# %%
grid = [2.0**k for k in range(-7, 4)]
curves = {"Pilot": [], "Minka": []}
for name, values in curves.items():
    for factor in grid:
        messages = [{"role": "user", "content": prompt}]
        with ak.steer(model, tokenizer, messages, {span: factor}) as steered:
            start = steered.texts[0] + "The name of our pet is"
            ids = tokenizer(start + f" {name}", return_tensors="pt", add_special_tokens=False).input_ids
            length = tokenizer(start, return_tensors="pt", add_special_tokens=False).input_ids.shape[1]
            with torch.no_grad():
                logprobs = model(ids).logits[0, length - 1 : -1].log_softmax(-1)
            values.append(logprobs.gather(1, ids[0, length:, None]).sum().item())

figure, axes = plt.subplots(figsize=(7, 3.5))
for name, values in curves.items():
    axes.plot(grid, values, marker="o", label=name)
axes.set_xscale("log", base=2)
axes.axvline(1, color="0.7", linewidth=1)
axes.set_xlabel(f"factor of “{span}”")
axes.set_ylabel("log p of the name, in nats")
axes.legend()
figure.tight_layout()

# %% [markdown]
# And what it says:

# %%
from html import escape

rows = "".join(
    f"<tr><td>× {factor:g}</td><td>{escape(text)}</td></tr>" for factor, text in zip(factors, answers, strict=True)
)
HTML(f"<table><tr><th>{escape(span)}</th><th>answer</th></tr>{rows}</table>")
