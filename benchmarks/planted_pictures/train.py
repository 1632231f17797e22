"""Train the model that answers questions about pictures, and write its weights and log to `weights/`.

    python -m benchmarks.planted_pictures.train

One thread throughout, so that the same versions on the same processor give the same weights.
"""

import json
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from benchmarks.machine import environment
from benchmarks.planted_pictures.model import WEIGHTS, colour_ids, pixel_values, prompts, untrained
from benchmarks.planted_pictures.pictures import OBJECTS, TILES, Pictures, draw

BATCH = 32
WARM_UP = 100  # steps
LEARNING_RATE = 1.5e-3
# Strong, to keep the attention from saturating: where a softmax is certain beyond rounding, no suppression by a
# factor of 0.1 moves the answer, and there is nothing to rank.
WEIGHT_DECAY = 0.5
UNSEEN = 1000  # pictures
UNSEEN_SEED = 10_000


def lesson(pictures: Pictures) -> tuple[Tensor, Tensor, Tensor]:
    """(count, length) ids that ask for one object after the other and answer, where to answer, and the answers.

    The first question stands as it does when it is the only one; the others teach the same from the same picture.
    """
    count, objects = pictures.shapes.shape
    asked = prompts(pictures.shapes.flatten())[:, TILES**2 :].view(count, objects, -1)
    answers = colour_ids(pictures.colours)  # [count, objects]
    turns = torch.cat([asked, answers[..., None]], dim=2).flatten(1)
    ids = torch.cat([prompts(pictures.shapes[:, 0])[:, : TILES**2], turns], dim=1)
    turn = asked.shape[2] + 1
    return ids, TILES**2 + turn * torch.arange(1, objects + 1) - 2, answers


def train(seed: int, steps: int, console: Console) -> tuple[LlavaForConditionalGeneration, list[dict[str, float]]]:
    """The trained model and its log."""
    model, generator = untrained(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP, max(0.02, (steps - step) / (0.5 * steps)))
    )
    log, begun = [], time.monotonic()
    for step in range(1, steps + 1):
        objects = int(torch.randint(1, OBJECTS + 1, (), generator=generator))  # few objects are learned first
        pictures = draw(BATCH, generator, objects)
        ids, where, answers = lesson(pictures)
        logits = model(input_ids=ids, pixel_values=pixel_values(pictures.pixels), logits_to_keep=where).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = float((logits.argmax(-1) == answers).float().mean())
            log.append({"step": step, "objects": objects, "loss": round(loss.item(), 4), "accuracy": round(right, 3)})
            console.print(log[-1] | {"seconds": round(time.monotonic() - begun)})
    return model.eval(), log


def accuracy(model: LlavaForConditionalGeneration, count: int, seed: int) -> float:
    """Share of right answers about pictures drawn from another seed, one question each."""
    right, generator = 0, torch.Generator().manual_seed(seed)
    for begin in range(0, count, 50):
        pictures = draw(min(50, count - begin), generator)
        with torch.no_grad():
            logits = model(
                input_ids=prompts(pictures.shapes[:, 0]),
                pixel_values=pixel_values(pictures.pixels),
                logits_to_keep=1,
            ).logits[:, -1]
        right += int((logits.argmax(-1) == colour_ids(pictures.colours[:, 0])).sum())
    return right / count


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--seed", default=0)
@click.option("--steps", type=click.IntRange(min=1), default=1500)
@click.option("--output", type=click.Path(path_type=Path), default=WEIGHTS)
def main(seed: int, steps: int, output: Path) -> None:
    torch.set_num_threads(1)
    model, log = train(seed, steps, Console())
    model = model.half().float()  # what is measured is what is kept
    report = {
        "environment": environment(),
        "seed": seed,
        "steps": steps,
        "accuracy": {"pictures": UNSEEN, "seed": UNSEEN_SEED, "share": accuracy(model, UNSEEN, UNSEEN_SEED)},
        "log": log,
    }
    model.half().save_pretrained(output)
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console().print(report["accuracy"], f"written to {output}")


if __name__ == "__main__":
    main()
