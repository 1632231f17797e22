"""Pictures whose right explanation is known: the task, the model that answers it, and what AtMan makes of it.

The model, its weights and the task are those of `benchmarks.planted_pictures`.
"""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atman_kernels import InputError
from atman_kernels.evaluation import metrics
from benchmarks.planted_pictures import explanations, model, pictures
from benchmarks.planted_pictures.explanations import Asked, ask

SEED = 30_000  # neither training nor the evaluation draws from it
PICTURES = 50
EXPLAINED = 16  # of them
TILES = pictures.TILES**2


@pytest.fixture(scope="module")
def drawn() -> pictures.Pictures:
    return pictures.draw(PICTURES, torch.Generator().manual_seed(SEED))


@pytest.fixture(scope="module")
def questions(drawn) -> list[Asked]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small gain nothing from more
    try:
        llava = model.load()
        yield [ask(llava, drawn.pixels[i], int(drawn.shapes[i, 0])) for i in range(PICTURES)]
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def answered(questions, drawn) -> list[tuple[Asked, Tensor]]:
    """The questions that the model answers, nearly all, each with the (objects, 64) tiles in its picture."""
    right = model.colour_ids(drawn.colours[:, 0]).tolist()
    kept = [
        (asked, model.in_order(tiles))
        for asked, tiles, colour in zip(questions, drawn.tiles(), right, strict=True)
        if asked.answer == colour
    ]
    assert len(kept) >= 0.96 * PICTURES, f"the model answers only {len(kept)} of {PICTURES}"
    return kept


def test_objects_are_where_their_masks_say_and_nowhere_else(drawn) -> None:
    covered = drawn.objects.any(1)
    assert int(drawn.objects.sum(1).max()) == 1, "objects do not overlap"
    # Saturated colours stand out from any grey, noise included.
    saturation = drawn.pixels.amax(1) - drawn.pixels.amin(1)
    assert saturation[covered].min() > 0.3 > saturation[~covered].max()


def test_an_object_has_one_colour_of_its_own(drawn) -> None:
    palette = torch.tensor(list(pictures.COLOURS.values()))
    for pixels, objects, colours in zip(drawn.pixels, drawn.objects, drawn.colours, strict=True):
        assert len(set(colours.tolist())) == pictures.OBJECTS
        means = torch.stack([pixels[:, mask].mean(1) for mask in objects])  # [objects, channel]
        means, known = (torch.nn.functional.normalize(x, dim=1) for x in (means, palette))
        assert (means @ known.T).argmax(1).tolist() == colours.tolist()


def test_tiles_are_those_that_an_object_reaches_into(drawn) -> None:
    for mask, tiles in zip(drawn.objects.flatten(0, 1), drawn.tiles().flatten(0, 1), strict=True):
        reached = {(y // pictures.PATCH, x // pictures.PATCH) for y, x in mask.nonzero().tolist()}
        assert {tuple(place) for place in tiles.nonzero().tolist()} == reached


def test_pictures_depend_on_the_seed_alone() -> None:
    first, again, other = (pictures.draw(2, torch.Generator().manual_seed(seed)).pixels for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("objects", [0, 7])
def test_an_impossible_number_of_objects_is_refused(objects: int) -> None:
    with pytest.raises(InputError, match=f"objects: got {objects}, expected 1 to 6"):
        pictures.draw(1, torch.Generator(), objects)


def test_nothing_of_an_object_reaches_other_tiles(drawn, questions) -> None:
    """The truth is planted: the language model gets an object by the tiles that it covers, and by no others."""
    object_pixels = drawn.objects[0, 0]
    recoloured = torch.where(object_pixels, drawn.pixels[0].flip(0), drawn.pixels[0])
    other = ask(questions[0].model, recoloured, int(drawn.shapes[0, 0]))
    changed = (other.embeddings - questions[0].embeddings)[:TILES].abs().amax(-1) > 1e-6
    assert torch.equal(changed, model.in_order(drawn.tiles()[0, 0]))


def test_tiles_come_cell_by_cell() -> None:
    numbered = torch.arange(64).view(8, 8)
    assert model.in_order(numbered)[:12].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13]
    crops = model.pixel_values(torch.arange(2 * 3 * 64 * 64.0).view(2, 3, 64, 64) / 1e5)
    expected = torch.arange(2 * 3 * 64 * 64.0).view(2, 3, 64, 64)[1, :, 16:32, 32:48] / 1e5 * 2 - 1
    torch.testing.assert_close(crops[16 + 6], expected)  # second picture, second row of cells, third cell


def test_the_shipped_weights_are_small() -> None:
    assert (model.WEIGHTS / "model.safetensors").stat().st_size < 5_000_000


@pytest.mark.parametrize("threshold", [None, explanations.THRESHOLD])
@pytest.mark.parametrize("mode", ["log_additive", "shifted"])
def test_the_strongest_tile_lies_on_the_object(answered, mode: str, threshold: float | None) -> None:
    hits = []
    for asked, tiles in answered[:EXPLAINED]:
        relevance = explanations.atman(asked, mode, threshold)
        hits.append([metrics.hit(relevance, truth) for truth in tiles])
    shares = torch.tensor(hits).float().mean(0)  # per object; the first was asked for
    assert shares[0] >= 0.9, shares
    assert shares[1:].max() <= 0.1, shares


@pytest.fixture(scope="module")
def asked(questions) -> Asked:
    """A wrong answer, whose log-prob moves with every tile; a right one may be certain beyond rounding."""
    wrong = [index for index in model.colour_ids(torch.arange(6)).tolist() if index != questions[0].answer]
    return replace(questions[0], answer=wrong[0])


def test_scores_equal_full_rows_under_a_float_mask(asked) -> None:
    assert explanations.FACTOR == 0
    length = len(asked.embeddings)
    masks = torch.full((length, length), -math.inf).triu(1).repeat(TILES + 1, 1, 1, 1)  # the last is the base
    for tile in range(TILES):
        masks[tile, :, :, tile] -= 1e9  # gone; not -inf, which makes NaN of a tile's own row
    rows = asked.embeddings.expand(TILES + 1, -1, -1)
    with torch.no_grad():
        logits = asked.model.get_decoder()(inputs_embeds=rows, attention_mask=masks).last_hidden_state[:, -1]
        losses = -asked.model.get_output_embeddings()(logits).double().log_softmax(-1)[:, asked.answer]
    found = explanations.atman(asked, "log_additive", None)
    assert found.abs().max() > 0.1, "the oracle must move, or the comparison says nothing"
    torch.testing.assert_close(found, losses[:-1] - losses[-1], atol=1e-4, rtol=0)


def test_the_embeddings_are_what_the_whole_model_runs_on(drawn, questions) -> None:
    asked = questions[0]
    ids = model.prompts(drawn.shapes[:1, 0])
    with torch.no_grad():
        logits = asked.model(input_ids=ids, pixel_values=model.pixel_values(drawn.pixels[:1])).logits[0, -1]
    expected = logits.double().log_softmax(-1)[asked.answer]
    torch.testing.assert_close(asked.without(torch.zeros(1, TILES, dtype=torch.bool))[0], expected, atol=1e-4, rtol=0)


def test_input_x_gradient_is_the_slope_of_stretching_a_tile(asked) -> None:
    wide = replace(asked, model=deepcopy(asked.model).double(), embeddings=asked.embeddings.double())
    step = 0.03  # not less: the norms of a Llama are in float32 whatever the rest
    stretch = step * torch.eye(len(wide.embeddings), dtype=torch.float64)[:TILES, :, None]  # [tile, length, 1]

    def logprobs(sign: int) -> Tensor:
        with torch.no_grad():
            logits = wide.model(inputs_embeds=wide.embeddings * (1 + sign * stretch)).logits[:, -1]
        return logits.log_softmax(-1)[:, wide.answer]

    slope = (logprobs(1) - logprobs(-1)) / (2 * step)
    assert slope.abs().max() > 0.01
    torch.testing.assert_close(explanations.input_x_gradient(wide), slope, atol=0.02 * float(slope.abs().max()), rtol=0)


def test_rollout_is_the_product_of_the_layers(asked) -> None:
    before = asked.model.config.text_config._attn_implementation
    product = torch.eye(len(asked.embeddings), dtype=torch.float64)
    for weights in explanations._attentions(asked):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-5, rtol=0)
        product = (weights.mean(0).double() + torch.eye(len(product))) / 2 @ product
    torch.testing.assert_close(explanations.rollout(asked).double(), product[-1, :TILES], atol=1e-6, rtol=0)
    torch.testing.assert_close(explanations.raw_attention(asked), weights.mean(0)[-1, :TILES])
    assert asked.model.config.text_config._attn_implementation == before


def test_chefer_is_the_product_of_the_layers(asked) -> None:
    rows = asked.embeddings[None].clone().requires_grad_()
    with explanations._eager(asked.model):
        run = asked.model(inputs_embeds=rows, output_attentions=True)
    relevance = torch.eye(len(asked.embeddings))
    for weights in run.attentions:  # the first layer first, all rows
        [gradient] = torch.autograd.grad(run.logits[0, -1, asked.answer], weights, retain_graph=True)
        relevance = relevance + (weights * gradient)[0].clamp(min=0).mean(0).detach() @ relevance
    found = explanations.chefer(asked)
    assert found.max() > 0.01
    torch.testing.assert_close(found, relevance[-1, :TILES], atol=1e-5, rtol=1e-3)
