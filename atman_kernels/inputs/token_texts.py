"""What to show for single tokens, where a character may be spread over several of them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers write for bytes that are no character yet
BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8
CONTEXT = 4  # finished tokens that are decoded along, as what a token looks like may hang on the one before
LONGEST_WINDOW = 64  # unfinished tokens; text has three, and only what is no text has more


def token_texts_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[list[str], list[tuple[int, int]]]:
    """The text of every token, such that they join to the whole, and its characters therein.

    A character that is spread over several tokens is shown with the last of them. Takes time in proportion to the
    number of tokens: each is decoded with a few others around it.

    >>> token_texts_of(tokenizer, tokenizer("a 🦊")["input_ids"])                           # doctest: +SKIP
    (['a', ' ', '', '', '🦊'], [(0, 1), (1, 2), (2, 2), (2, 2), (2, 3)])
    """
    pieces: list[str] = []
    starts = [0]  # of finished stretches: at least one token before the one that is being finished
    shown = ""  # the part of the window's text that is in `pieces` already
    window = 0  # its first token
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[window:end], clean_up_tokenization_spaces=False)
        finished = not text.endswith(UNFINISHED) or end == len(ids) or end - starts[-1] > LONGEST_WINDOW
        if not finished:
            pieces.append("")
            continue
        pieces.append(text[len(shown) :] if text.startswith(shown) else tokenizer.decode(ids[end - 1 : end]))
        starts = [*starts[-CONTEXT:], end]
        window = starts[0]
        shown = tokenizer.decode(ids[window:end], clean_up_tokenization_spaces=False)
    offsets, position = [], 0
    for piece in pieces:
        offsets.append((position, position + len(piece)))
        position += len(piece)
    return pieces, offsets
