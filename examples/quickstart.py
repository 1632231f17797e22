# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Quickstart
# Which words of a prompt does an answer rest on? Each word is suppressed alone, in every layer, as if the model had
# never
# seen it; its score is by how many nats the answer's loss rises.

# %%
import atman_kernels as ak

model, tokenizer = ak.load_model("smollm2", dtype="float32")
explainer = ak.Explainer(model, tokenizer, progress=False)

# %%
prompt = (
    "The ferry to Vessel Island leaves at noon. Captain Idra Molnar steers it.\n"
    "Question: Who steers the ferry?\nAnswer:"
)
explanation = explainer.explain(prompt, target=" Idra Molnar", units="word")
explanation.top(5)

# %% [markdown]
# The heatmap: click a token of the answer to see what that token alone rests on.

# %%
explanation

# %% [markdown]
# The same as bars. Positive speaks for the answer, negative against it.

# %%
axes = explanation.plot("bar", top=10)
