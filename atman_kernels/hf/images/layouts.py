"""Where the image tokens of an image-text model's prompt stand, and how they lie in the image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

from atman_kernels.errors import InputError, UnsupportedModelError

Crops = Literal["names", "canvas"]
UNTRACED = "which patch of which crop becomes part of which token is not known"


@dataclass(frozen=True)
class ImageFamily:
    """What has to be known about a kind of model to explain its images.

    Attributes:
        layout: how the tokens of an image (or crop) lie in it: a "square" grid; the "grid" that the processor reports;
            "rows" with a token of another kind after each; "anyres", a square of the whole image and then its rows
            in a higher resolution, each with a newline; or nowhere: "queries".
        crops: how the crops of an image are told: by their "names" in the prompt, or as what the "canvas" with the
            image's proportions was cut into, row by row and followed by the whole image.
        answer_type: token type id of an answer's tokens, where the model has such.
        vision_refused: why patches cannot be suppressed in the vision encoder; "" where they can.
    """

    layout: Literal["square", "grid", "rows", "anyres", "queries"]
    crops: Crops = "names"
    answer_type: int = 0
    vision_refused: str = ""


IMAGE_FAMILIES = {  # by config.model_type
    "aya_vision": ImageFamily("square", crops="canvas"),
    "blip-2": ImageFamily("queries", vision_refused="its image tokens are queries, which no patches belong to"),
    "cohere2_vision": ImageFamily("square", crops="canvas"),
    "gemma3": ImageFamily("square"),
    "glm46v": ImageFamily("grid"),
    "glm4v": ImageFamily("grid"),
    "glm4v_moe": ImageFamily("grid"),
    "idefics3": ImageFamily("square"),
    "internvl": ImageFamily("square", crops="canvas"),
    "llava": ImageFamily("square"),
    "llava_next": ImageFamily("anyres", vision_refused=UNTRACED),
    "llava_onevision": ImageFamily("anyres", vision_refused=UNTRACED),
    "mistral3": ImageFamily("rows"),
    "paligemma": ImageFamily("square", answer_type=1),  # 0 is the prefix, which is bidirectional
    "qwen2_5_vl": ImageFamily("grid"),
    "qwen2_vl": ImageFamily("grid"),
    "qwen3_5": ImageFamily("grid"),
    "qwen3_5_moe": ImageFamily("grid"),
    "qwen3_vl": ImageFamily("grid"),
    "qwen3_vl_moe": ImageFamily("grid"),
    "smolvlm": ImageFamily("square"),
    "vipllava": ImageFamily("square"),
}


@dataclass(frozen=True)
class Place:
    """What a block of image tokens shows.

    Attributes:
        image: which of the prompt's images.
        size: (width, height) of that image.
        region: what the block covers of it: left, top, right, bottom in its pixels.
        name: of the crop; "" if the block is all there is of the image.
    """

    image: int
    size: tuple[int, int]
    region: tuple[float, float, float, float]
    name: str = ""


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image, or of one crop where the processor cut images into crops.

    Attributes:
        first: position of the first.
        count: how many, what separates their rows included.
        grid: (rows, columns); None where the tokens are no places of the image.
        step: from a position to that below it.
        pixels: (width, height) of what the vision tower saw.
        place: what they show, where the model's inputs tell.
    """

    first: int
    count: int
    grid: tuple[int, int] | None
    step: int
    pixels: tuple[int, int]
    place: Place | None = None

    def positions(self) -> Tensor:
        """(rows, columns) of a grid, in the sequence."""
        assert self.grid is not None
        return (
            self.first
            + torch.arange(self.grid[0], device="cpu")[:, None] * self.step
            + torch.arange(self.grid[1], device="cpu")
        )


@dataclass(frozen=True)
class _Size:
    """A block whose tokens are still to be found.

    Attributes:
        tokens: how many have the id of image tokens.
        grid, pixels, place: as of `ImageTokens`.
        separated: whether a token follows each row.
    """

    tokens: int
    grid: tuple[int, int] | None
    pixels: tuple[int, int]
    separated: bool = False
    place: Place | None = None

    def at(self, positions: list[int]) -> ImageTokens | None:
        """The block whose image tokens stand at these positions; None if it cannot be there."""
        step = 0 if self.grid is None else self.grid[1] + self.separated
        count = positions[-1] + 1 - positions[0]
        block = ImageTokens(positions[0], count, self.grid, step, self.pixels, self.place)
        if self.grid is None or self.tokens > self.grid[0] * self.grid[1]:  # separators are image tokens themselves
            return block if count == self.tokens else None
        return block if positions == block.positions().flatten().tolist() else None


def image_family_of(model: PreTrainedModel) -> ImageFamily:
    """What is known about the model's images.

    Raises:
        UnsupportedModelError: nothing.
    """
    kind = getattr(model.config, "model_type", None)
    if kind not in IMAGE_FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be explained with images: where its image tokens lie in a picture is not "
            "known; docs/images.md has the models of which it is"
        )
    if kind == "llava" and model.config.vision_config.model_type == "pixtral":
        return ImageFamily("rows")
    return IMAGE_FAMILIES[kind]


def image_tokens(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[ImageTokens]:
    """The tokens of every image (or crop) of a prompt, in order.

    Raises:
        InputError: placeholders and images do not belong together, or lie in no grid that is known.
        UnsupportedModelError: the model's family is not known.
    """
    family = image_family_of(model)
    token = model.config.image_token_id
    places = (inputs["input_ids"][0] == token).nonzero()[:, 0].tolist()
    if not places:
        raise InputError(f"text has no image placeholder (token id {token}), but images came with it")
    if family.layout == "grid":
        sizes = _reported_grids(model, inputs)
    elif family.layout == "rows":
        sizes = _reported_sizes(model, inputs)
    elif family.layout == "anyres":
        sizes = _two_resolutions(model, inputs)
    else:
        sizes = _equal_shares(model, inputs, len(places), family)
    wanted = sum(size.tokens for size in sizes)
    if wanted != len(places):
        raise InputError(f"text has {len(places)} image tokens, but the images' grids make {wanted}")
    found = []
    for size in sizes:
        own, places = places[: size.tokens], places[size.tokens :]
        block = size.at(own)
        if block is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be explained with images: other tokens stand among those of an image"
            )
        found.append(block)
    return found


def _given(model: PreTrainedModel, inputs: Mapping[str, Tensor], name: str) -> list[list[int]]:
    if name not in inputs:
        raise InputError(f"inputs hold no {name!r}, which {type(model).__name__} needs")
    return inputs[name].tolist()


def _reported_grids(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[_Size]:
    """From what the processor says: its patches, some of which the model merges into one token."""
    vision = model.config.vision_config
    merge, patch = int(vision.spatial_merge_size), int(vision.patch_size)
    sizes: list[_Size] = []
    for frames, height, width in _given(model, inputs, "image_grid_thw"):
        if frames != 1:
            raise InputError(f"inputs['image_grid_thw'] has {frames} frames; images have one, videos are not explained")
        grid = (height // merge, width // merge)
        sizes.append(_Size(grid[0] * grid[1], grid, (width * patch, height * patch)))
    return sizes


def _reported_sizes(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[_Size]:
    """From the pixels that the processor made of each image, Pixtral's way."""
    side = int(model.config.vision_config.patch_size) * int(getattr(model.config, "spatial_merge_size", 1))
    return [
        _Size((height // side) * (width // side), (height // side, width // side), (width, height), separated=True)
        for height, width in _given(model, inputs, "image_sizes")
    ]


def _two_resolutions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[_Size]:
    """LLaVA-NeXT's way: the whole image as a square, then the crops of the canvas into which it fits best, joined."""
    side = int(model.config.vision_config.image_size)
    patches = side // int(model.config.vision_config.patch_size)
    together = inputs["batch_num_images"].tolist() if "batch_num_images" in inputs else []
    cut = [count == 1 for count in together for _ in range(count)]  # LLaVA-OneVision cuts no images that came together
    sizes = []
    for image, (height, width) in enumerate(_given(model, inputs, "image_sizes")):
        whole = Place(image, (width, height), (0.0, 0.0, float(width), float(height)), "whole")
        if cut and not cut[image]:
            sizes.append(_Size(patches**2 + 1, (patches, patches), (side, side), place=replace(whole, name="")))
            continue  # one newline
        sizes.append(_Size(patches**2, (patches, patches), (side, side), place=whole))
        canvas = select_best_resolution((height, width), model.config.image_grid_pinpoints)
        grid, region = _without_border((height, width), canvas, patches / side)
        grid = _at_most(grid, getattr(model.config, "vision_aspect_ratio", None), patches)
        details = Place(image, (width, height), region, "details")
        sizes.append(_Size(grid[0] * (grid[1] + 1), grid, (canvas[1], canvas[0]), separated=True, place=details))
    return sizes


def _without_border(
    image: tuple[int, int], canvas: tuple[int, int], patches_per_pixel: float
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """The patches that are left of a canvas once the border around the image is cut off, and what they cover of it.

    Args:
        image, canvas: (height, width). The image is scaled to fit and stands in the middle.
    """
    scale = min(canvas[0] / image[0], canvas[1] / image[1])
    grid, low, high = [], [], []
    for side in (0, 1):
        patches = round(canvas[side] * patches_per_pixel)
        other = round(canvas[1 - side] * patches_per_pixel)
        kept = min(patches, int(round(image[side] * (other / image[1 - side]), 7)))
        border = (patches - kept) // 2
        grid.append(patches - 2 * border)
        covered = grid[side] / patches_per_pixel / scale  # in the image's pixels
        low.append((image[side] - covered) / 2)
        high.append((image[side] + covered) / 2)
    return (grid[0], grid[1]), (low[1], low[0], high[1], high[0])


def _at_most(grid: tuple[int, int], limit: str | None, patches: int) -> tuple[int, int]:
    """LLaVA-OneVision's limit, "anyres_max_9": a grid much larger than so many squares is scaled down."""
    if limit is None:
        return grid
    ratio = math.sqrt(grid[0] * grid[1] / (int(limit.removeprefix("anyres_max_")) * patches**2))
    return grid if ratio <= 1.1 else (int(grid[0] // ratio), int(grid[1] // ratio))


def _equal_shares(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], tokens: int, family: ImageFamily
) -> list[_Size]:
    """All images (or crops) are of one size and have the same number of tokens."""
    *_, height, width = inputs["pixel_values"].shape
    images = math.prod(inputs["pixel_values"].shape[:-3])
    if tokens % images:
        raise InputError(f"text has {tokens} image tokens, which do not divide among {images} images")
    count = tokens // images
    if family.layout == "queries":
        wanted = model.config.num_query_tokens
        if count != wanted:
            raise InputError(f"text has {count} image tokens per image, but the model has {wanted} queries")
        return [_Size(count, None, (width, height))] * images
    return [_Size(count, _square(count, height, width), (width, height))] * images


def _square(count: int, height: int, width: int) -> tuple[int, int]:
    side = math.isqrt(count)
    if side * side != count or height != width:
        raise InputError(
            f"images: {count} tokens for {width} × {height} pixels are a patch grid that is not square, and the "
            "processor does not report its rows and columns"
        )
    return side, side
