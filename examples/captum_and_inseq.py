# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # captum and inseq
# Both libraries' own calls, inputs, results and plots, with attention suppressed where they would replace tokens.

# %%
import captum.attr as ca
import inseq
from IPython.display import HTML

import atman_kernels as ak
import atman_kernels.adapters.inseq  # registers the method "atman"
from atman_kernels.adapters.captum import AtManAttribution, SuppressedLLMAttribution, SuppressedTextInput

model, tokenizer = ak.load_model("smollm2", dtype="float32")
prompt = "Anna lives in Paris, and Bert lives in Rome. The one who lives in Rome is called"

# %% [markdown]
# captum: AtMan where `LLMAttribution(FeatureAblation(model), tokenizer)` stood.

# %%
attribution = AtManAttribution(model, tokenizer, progress=False)
result = attribution.attribute(prompt, " Bert", units="word")
list(zip(result.input_tokens, [round(score, 1) for score in result.seq_attr.tolist()], strict=True))

# %% [markdown]
# captum's Shapley sampling over the same features; all its perturbations run in packs.

# %%
inp = SuppressedTextInput(prompt, attribution.explainer, units="word")
shapley = SuppressedLLMAttribution(ca.ShapleyValueSampling(model), tokenizer)
sampled = shapley.attribute(inp, " Bert", n_samples=6, show_progress=False)
figure, axes = sampled.plot_seq_attr(show=False)

# %% [markdown]
# inseq: every generated token, by all that stood before it.

# %%
inseq_model = inseq.load_model(model, "atman", tokenizer=tokenizer)
found = inseq_model.attribute(prompt, f"{prompt} Bert.", show_progress=False)
HTML(found.show(display=False, return_html=True))
