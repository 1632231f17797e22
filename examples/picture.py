# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Explain a picture
# A small image–text model, trained to name the colour of a shape among others: the right explanation is known. It is in
# this repository, so run this in a checkout.

# %%
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

import atman_kernels as ak

sys.path.insert(0, str(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "benchmarks").is_dir())))
from benchmarks.planted_pictures import model as planted
from benchmarks.planted_pictures.pictures import COLOURS, SHAPES, draw

model = planted.load().double()


# %%
def box(number: int) -> tuple[int, int, int, int]:
    """Of one of the 64 tiles, in pixels: the model sees 4 × 4 cells of 2 × 2 tiles."""
    cell, tile = divmod(number, 4)
    left, top = 96 * (cell % 4) + 48 * (tile % 2), 96 * (cell // 4) + 48 * (tile // 2)
    return left, top, left + 48, top + 48


def overlay(picture, image: Image.Image, index: int, threshold: float | None) -> Image.Image:
    """The picture with the scores of its tiles for the colour of one of its shapes."""
    inputs = {
        "input_ids": planted.prompts(picture.shapes[0, index : index + 1]),
        "pixel_values": planted.pixel_values(picture.pixels),
    }
    explainer = ak.Explainer(model, planted.tokenizer(), similarity_threshold=threshold, progress=False)
    found = explainer.explain(inputs, list(COLOURS)[picture.colours[0, index]], units=None)
    units = tuple(replace(unit, image=0, box=box(number)) for number, unit in enumerate(found.units))
    return replace(found, units=units).overlay(image)


# %% [markdown]
# Three questions about one picture. Without κ a tile is suppressed alone, and its neighbours still tell of the
# shape; with κ
# = 0.7 the tiles that look alike go with it.

# %%
picture = draw(1, torch.Generator().manual_seed(11))
pixels = (picture.pixels[0].clamp(0, 1).permute(1, 2, 0) * 255).byte().numpy()
image = Image.fromarray(pixels).resize((384, 384), Image.Resampling.NEAREST)
figure, axes = plt.subplots(3, 3, figsize=(10, 10.5))
for row, index in zip(axes, range(3), strict=True):
    shown = (image, overlay(picture, image, index, None), overlay(picture, image, index, 0.7))
    titles = (
        f"what colour is the {SHAPES[picture.shapes[0, index]]}?",
        "each tile alone",
        "with similar tiles, κ = 0.7",
    )
    for place, panel, title in zip(row, shown, titles, strict=True):
        place.imshow(panel)
        place.set_title(title, fontsize=10)
        place.axis("off")
figure.tight_layout()
