"""Questions whose passage stands somewhere among others, in prompts of a given length."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from atman_kernels.evaluation.squad import Item, drawn

BETWEEN = "\n\n"  # passages
SLACK = 4  # tokens that joints may take more or less than counted


def short_questions(tokenizer: Any, items: Sequence[Item], tokens: int, seed: int) -> list[Item]:
    """Questions whose own prompt has at most so many tokens: the first one about each passage, then the second, …

    Passages are in random order.
    """
    numbered: dict[str, int] = {}
    found = []
    for item in drawn(items, None, seed):
        if _length(tokenizer, item.prompt(chat=False)) <= tokens:
            number = numbered[item.context] = numbered.get(item.context, 0) + 1
            found.append((number, item))
    return [item for _, item in sorted(found, key=lambda each: each[0])]


def lengthened(tokenizer: Any, item: Item, others: Sequence[Item], tokens: int, seed: int) -> Item:
    """The same question with passages of other articles before and after its own, `tokens` tokens of prompt or less.

    How much stands before is drawn evenly; the outermost passages are cut between words, so a few tokens are missing.

    Raises:
        ValueError: the question's own prompt is longer.
    """
    rng = random.Random(f"{seed} {item.id} {tokens}")
    room = tokens - _length(tokenizer, item.prompt(chat=False))
    if room < 0:
        raise ValueError(f"question {item.id} takes {tokens - room} tokens by itself, {tokens} are wanted")
    passages = list(dict.fromkeys(other.context for other in others if other.article != item.article))
    rng.shuffle(passages)
    half = len(passages) // 2
    before = rng.randint(0, room)
    head = _last_words(tokenizer, BETWEEN.join(passages[:half]), before - SLACK)
    tail = _first_words(tokenizer, BETWEEN.join(passages[half:]), room - before - SLACK)
    context = BETWEEN.join(part for part in (head, item.context, tail) if part)
    assert item.start is not None
    start = item.start + (len(head) + len(BETWEEN) if head else 0)
    return replace(item, id=f"{item.id}@{tokens}", context=context, start=start)


def _first_words(tokenizer: Any, text: str, tokens: int) -> str:
    """Whole words from the beginning of a text, so many tokens or fewer."""
    if tokens <= 0:
        return ""
    text = text[: 16 * tokens]
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    if len(ends) <= tokens:
        return text
    cut = text[: ends[tokens - 1]]
    return cut if text[len(cut) : len(cut) + 1].isspace() else cut.rpartition(" ")[0]


def _last_words(tokenizer: Any, text: str, tokens: int) -> str:
    """Whole words from the end of a text, so many tokens or fewer."""
    if tokens <= 0:
        return ""
    text = text[-16 * tokens :]
    starts = [start for start, _ in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    if len(starts) <= tokens:
        return text
    cut = text[starts[-tokens] :]
    return cut.lstrip() if cut[:1].isspace() or text[starts[-tokens] - 1].isspace() else cut.partition(" ")[2]


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])
