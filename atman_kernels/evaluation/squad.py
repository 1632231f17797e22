"""Questions with a known answer: files in the format of SQuAD 1.1 and 2.0."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atman_kernels.arguments import integer, text_or_empty
from atman_kernels.errors import InputError

Split = Literal["dev", "test"]
# How a question is put: as a text that the model continues, and as the user's message to a chat model.
PLAIN_PROMPT = "{context}\n\nQuestion: {question}\nAnswer:"
CHAT_PROMPT = "{context}\n\n{question}"


@dataclass(frozen=True)
class Item:
    """A question over a passage.

    Attributes:
        id: the file's own.
        article: title of the article that the passage is from.
        context: the passage.
        question: about it.
        answer: the first of the answers that people gave; None where the passage has none.
        start: where it stands in the passage, in characters; None where there is none.
    """

    id: str
    article: str
    context: str
    question: str
    answer: str | None
    start: int | None

    def prompt(self, chat: bool) -> str:
        """The prompt of `PLAIN_PROMPT` or `CHAT_PROMPT`.

        >>> Item("", "", "Pilot is a dog.", "Who is a dog?", "Pilot", 0).prompt(chat=True)
        'Pilot is a dog.\\n\\nWho is a dog?'
        """
        return (CHAT_PROMPT if chat else PLAIN_PROMPT).format(context=self.context, question=self.question)

    def target(self, chat: bool) -> str | None:
        """The answer as it continues that prompt: after a space, or as a message of its own. None if there is none.

        >>> Item("", "", "Pilot is a dog.", "Who is a dog?", "Pilot", 0).target(chat=False)
        ' Pilot'
        """
        return self.answer if chat or self.answer is None else f" {self.answer}"

    @property
    def problem(self) -> str | None:
        """Why it cannot be measured: no answer, or not where the file says. None if it can."""
        if not self.answer or not self.answer.strip() or self.start is None:
            return "it has no answer"
        if self.context[self.start : self.start + len(self.answer)] != self.answer:
            return f"its answer {self.answer!r} does not stand at character {self.start} of its context"
        return None


def read_items(file: str | Path) -> list[Item]:
    """All questions of a file, in its order.

    Raises:
        InputError: it cannot be read, is not UTF-8 or JSON, has another format, or repeats an id.
    """
    try:
        content = json.loads(Path(file).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    try:
        return [
            _item(entry, article.get("title", ""), paragraph["context"])
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
        ]
    except InputError as error:
        raise InputError(f"{file} is not in SQuAD format: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not in SQuAD format ({type(error).__name__}: {error})") from error


def split_of(item: Item) -> Split:
    """Which part of the data a question belongs to: "dev" for a quarter of the articles, by a hash of the title.

    Articles stay whole, so that settings chosen on "dev" have seen no passage of "test". The same in every file.

    >>> split_of(Item("", "Chloroplast", "", "", None, None))
    'test'
    """
    return "dev" if hashlib.sha256(item.article.encode()).digest()[0] % 4 == 0 else "test"


def drawn(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """The first `count` questions, passage by passage, with the passages in random order; None: all questions.

    Questions about one passage stay together, since they can be explained together.

    Raises:
        InputError: seed or count is no integer >= 0.

    >>> items = [Item(str(i), "", f"passage {i // 2}", "", None, None) for i in range(6)]
    >>> [item.id for item in drawn(items, 3, seed=0)]
    ['0', '1', '4']
    """
    seed = integer(seed, "seed", least=0)
    count = None if count is None else integer(count, "count", least=0, expected="an integer >= 0 or None")
    passages: dict[str, list[Item]] = {}
    for item in items:
        passages.setdefault(item.context, []).append(item)
    order = list(passages)
    random.Random(seed).shuffle(order)
    return [item for context in order for item in passages[context]][:count]


def usable(items: Iterable[Item]) -> tuple[list[Item], list[str]]:
    """The items that can be measured, and one line for each other item that says why it cannot."""
    good, left_out = [], []
    for item in items:
        if item.problem is None:
            good.append(item)
        else:
            left_out.append(f"{item.id}: {item.problem}")
    return good, left_out


def _item(entry: dict[str, Any], article: str, context: str) -> Item:
    answers = entry.get("answers") or [{"text": None}]
    item = Item(
        str(entry.get("id", "")),
        article,
        context,
        entry["question"],
        answers[0]["text"],
        answers[0].get("answer_start"),
    )
    for name, kind in (
        ("article", str),
        ("context", str),
        ("question", str),
        ("answer", str | None),
        ("start", int | None),
    ):
        value = getattr(item, name)
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r:.40}")
        if isinstance(value, str):
            text_or_empty(value, f"{name} of {item.id!r}")
    return item
