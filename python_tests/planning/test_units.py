"""Units: which tokens belong together, and which characters they show."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from atman_kernels.errors import InputError
from atman_kernels.planning import units as units_module
from atman_kernels.planning.units import GRANULARITIES, Unit, split_units, target_units

CORPUS = [
    "The old lighthouse keeper rowed home before the storm. He didn't look back, and nobody asked why.",
    "In 1897 the harbour had 3.14 miles of quay; today it's a well-known museum.\n\nVisitors come by boat.",
    "Where did the keeper row? He rowed home. user assistant system question answer\r\n\r\nThe end.\tReally?",
] * 3
SPECIALS = ("<|im_start|>", "<|im_end|>")


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of a few hundred tokens, so that rare characters fall apart into bytes."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    built.add_special_tokens([AddedToken(special, special=True) for special in SPECIALS])
    return built


def encode(text: str) -> tuple[list[tuple[int, int]], list[bool]]:
    encoded = tokenizer().encode(text)
    return encoded.offsets, [token in SPECIALS for token in encoded.tokens]


def split(text: str, granularity: str, **options: object) -> list[str]:
    """Texts of the units under the byte-level tokenizer."""
    offsets, special = encode(text)
    return [unit.text for unit in split_units(text, offsets, granularity, special=special, **options)]


def split_characters(text: str, granularity: str) -> list[str]:
    """Texts of the units when every character is a token: only the rules for text are at work."""
    offsets = [(at, at + 1) for at in range(len(text))]
    return [unit.text for unit in split_units(text, offsets, granularity)]


def owners(units: tuple[Unit, ...]) -> dict[int, int]:
    return {token: index for index, unit in enumerate(units) for token in unit.token_indices}


def test_the_tokenizer_of_these_tests_has_the_awkward_cases():
    offsets, special = encode("<|im_start|> keeper 😀")
    assert special == [True] + [False] * (len(offsets) - 1)
    assert (12, 19) in offsets  # " keeper" with its space
    assert sum(end == 21 for _, end in offsets) > 1  # one emoji in several tokens


# Named granularities


def test_token_units_are_the_tokens_with_their_white_space():
    text = "The keeper rowed  home 😀"
    offsets, _ = encode(text)
    units = split_units(text, offsets)
    assert [(unit.start, unit.end) for unit in units] == offsets
    assert [unit.text for unit in units] == [text[start:end] for start, end in offsets]
    assert [unit.token_indices for unit in units] == [(index,) for index in range(len(offsets))]
    assert {unit.source for unit in units} == {"prompt"}


WORDS = {
    "apostrophes and hyphens": ("He didn't – it’s well-known.", "He didn't – it’s well-known ."),
    "quotes": ("the 'old' keepers' -boat-", "the ' old ' keepers ' - boat -"),
    "numbers": ("$3.50, 1,000.5 or 7. End", "$ 3.50 , 1,000.5 or 7 . End"),
    "a full stop between letters": ("home.Then a.b", "home . Then a . b"),
    "abbreviations": ("the U.S. harbour, e.g. Hull", "the U.S. harbour , e.g. Hull"),
    "identifiers": ("max_length2 = 4;", "max_length2 = 4 ;"),
    "accents, precomposed or not": ("caf\u00e9 cafe\u0301!", "caf\u00e9 cafe\u0301 !"),
    "hindi": ("हिन्दी में नमस्ते।", "हिन्दी में नमस्ते ।"),
    "arabic with a non-joiner": ("می\u200cخواهم خانه", "می\u200cخواهم خانه"),
    "korean": ("한국어 문장", "한국어 문장"),
    "chinese": ("今天很好。Good今", "今 天 很 好 。 Good 今"),
    "chinese around full stops": ("好.吗.", "好 . 吗 ."),
    "japanese": ("コーヒーを飲む", "コーヒー を 飲 む"),
    "thai": ("สวัสดี", "ส วั ส ดี"),
    "emoji": ("ok👩‍👩‍👧🇩🇪🇫🇷 👍🏽 1️⃣", "ok 👩‍👩‍👧 🇩🇪 🇫🇷 👍🏽 1️⃣"),
    "white space of all kinds": (" a\r\n\tb\u00a0c\u3000d\n", "a b c d"),
}


@pytest.mark.parametrize(("text", "expected"), WORDS.values(), ids=WORDS.keys())
def test_words_of_text(text, expected):
    assert split_characters(text, "word") == expected.split(" ")


def test_words_of_tokens():
    assert split("The keeper didn't row 3.14 miles.", "word") == [
        "The", "keeper", "didn't", "row", "3.14", "miles", ".",
    ]  # fmt: skip


def test_a_token_across_two_words_belongs_to_the_first():
    units = split_units("it)). So", [(0, 2), (2, 5), (5, 8)], "word")
    assert [(unit.text, unit.token_indices) for unit in units] == [("it", (0,)), (")).", (1,)), ("So", (2,))]


def test_tokens_that_share_a_character_stay_together():
    text = "a 😀 好"
    offsets, special = encode(text)
    units = split_units(text, offsets, "word", special=special)
    assert [unit.text for unit in units] == ["a", "😀", "好"]
    assert sum(len(unit.token_indices) for unit in units) == len(offsets) > 3


SENTENCES = {
    "abbreviations, decimals, quotes": (
        'Dr. Smith paid $3.50, e.g. for Fig. 3. "Really?" he asked. Yes!',
        ["Dr. Smith paid $3.50, e.g. for Fig. 3.", '"Really?" he asked.', "Yes!"],
    ),
    "line breaks inside": ("One line\ngoes on. Two.\nThree.", ["One line\ngoes on.", "Two.", "Three."]),
    "blank lines end a sentence": ("A title\n\nThe text. More", ["A title", "The text.", "More"]),
    "windows line ends": ("A title\r\n\r\nThe text.\r\nMore", ["A title", "The text.", "More"]),
    "chinese": ("今天很好。对吗？ The end.", ["今天很好。", "对吗？", "The end."]),
    "emoji and tabs": ("Fine 😀.\tNext one 👍🏽!", ["Fine 😀.", "Next one 👍🏽!"]),
    "no end": ("no full stop here", ["no full stop here"]),
    "surrounded by white space": ("\n  One. Two. \n", ["One.", "Two."]),
}


@pytest.mark.parametrize(("text", "expected"), SENTENCES.values(), ids=SENTENCES.keys())
@pytest.mark.parametrize("splitter", [split, split_characters], ids=["tokens", "characters"])
def test_sentences(text, expected, splitter):
    assert splitter(text, "sentence") == expected


def test_the_language_of_sentences():
    text = "Das Haus (ca. 1900) steht am 3. Mai leer, vgl. Abb. 2. Ende."
    assert split(text, "sentence", language="de") == [text[:-6], "Ende."]


@pytest.mark.parametrize("wide", ["\u3000", "\u2028", "\u00a0", "\x85"])
def test_sentences_survive_what_the_splitter_cannot_take(wide):
    # sentencex 1.0.32 aborts on an initial after white space of several bytes, and cannot encode surrogates.
    text = f"A{wide}. \ud800 first. Second one."
    assert split_characters(text, "sentence")[-1] == "Second one."


PARAGRAPHS = {
    "unix": ("One. Two\nstill one.\n\nTwo.", ["One. Two\nstill one.", "Two."]),
    "windows": ("One.\r\nStill one.\r\n\r\nTwo.", ["One.\r\nStill one.", "Two."]),
    "old mac": ("One.\rStill one.\r\rTwo.", ["One.\rStill one.", "Two."]),
    "lines of blanks": ("One.\n \t\n\n  Two.\n\t", ["One.", "Two."]),
    "paragraph separator": ("One.\u2029Two.", ["One.", "Two."]),
    "leading blank lines": ("\n\nOne.\n\nTwo.", ["One.", "Two."]),
    "chinese": ("今天很好。\n\n对吗？", ["今天很好。", "对吗？"]),
}


@pytest.mark.parametrize(("text", "expected"), PARAGRAPHS.values(), ids=PARAGRAPHS.keys())
@pytest.mark.parametrize("splitter", [split, split_characters], ids=["tokens", "characters"])
def test_paragraphs(text, expected, splitter):
    assert splitter(text, "paragraph") == expected


def test_white_space_joins_the_unit_before_it_else_the_one_after():
    text = " \n Home  \n again "
    units = split_units(text, [(0, 1), (1, 3), (3, 7), (7, 9), (9, 10), (10, 16), (16, 17)], "word")
    assert units == (Unit("Home", 3, 7, (0, 1, 2, 3, 4)), Unit("again", 11, 16, (5, 6)))


@pytest.mark.parametrize("granularity", GRANULARITIES[1:])
def test_text_of_white_space_alone_is_one_unit(granularity):
    assert split_units(" \n\t", [(0, 1), (1, 3)], granularity) == (Unit(" \n\t", 0, 3, (0, 1)),)


# Special tokens

CHAT = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWho? When?<|im_end|>\n<|im_start|>assistant\n"


def test_sentences_of_a_chat_template():
    assert split(CHAT, "sentence") == [
        "<|im_start|>", "system", "You help.", "<|im_end|>", "\n",
        "<|im_start|>", "user", "Who?", "When?", "<|im_end|>", "\n",
        "<|im_start|>", "assistant",
    ]  # fmt: skip


def test_paragraphs_of_a_chat_template():
    texts = split(CHAT, "paragraph")
    assert texts[6:10] == ["user", "Who? When?", "<|im_end|>", "\n"]


def test_a_first_line_is_a_role_only_behind_a_written_special_token():
    text = "Title\nFirst line."
    assert split(text, "paragraph") == [text]
    offsets, _ = encode(text)
    units = split_units(text, [(0, 0), *offsets], "paragraph")  # a token without characters in front
    assert [unit.text for unit in units] == ["", text]


def test_special_tokens_without_characters():
    text = "One. Two."
    offsets, texts = [(0, 0), (0, 4), (0, 0), (4, 9), (0, 0)], ["<s>", "One.", "<sep>", " Two.", "</s>"]
    expected = (
        Unit("<s>", 0, 0, (0,)),
        Unit("One.", 0, 4, (1,)),
        Unit("<sep>", 4, 4, (2,)),
        Unit("Two.", 5, 9, (3,)),
        Unit("</s>", 9, 9, (4,)),
    )
    for special in (None, [1, 0, 1, 0, 1]):
        assert split_units(text, offsets, "sentence", special=special, token_texts=texts) == expected
    assert [unit.text for unit in split_units(text, offsets, "token", token_texts=texts)] == [
        "<s>", "One.", "<sep>", " Two.", "</s>",
    ]  # fmt: skip
    assert [unit.text for unit in split_units(text, offsets, "paragraph")] == ["", "One.", "", "Two.", ""]


def test_ordinary_tokens_without_characters_join_their_neighbours():
    offsets = [(0, 0), (0, 3), (3, 3), (3, 7)]
    units = split_units("One Two", offsets, "word", special=[False] * 4, token_texts=["▁", "One", "▁", "Two"])
    assert units == (Unit("One", 0, 3, (0, 1, 2)), Unit("Two", 4, 7, (3,)))


# Custom spans


def test_custom_spans_own_the_tokens_they_touch():
    text = "The keeper rowed home"
    offsets = [(0, 3), (3, 10), (10, 16), (16, 21)]
    spans = [(4, 10), (8, 12), (0, 21), (0, 4), (16, 21), (3, 4), (4, 10)]
    units = split_units(text, offsets, spans)
    assert [unit.token_indices for unit in units] == [(1,), (1, 2), (0, 1, 2, 3), (0,), (3,), (1,), (1,)]
    assert [unit.text for unit in units] == ["keeper", "er r", text, "The", "home", " ", "keeper"]
    assert all(unit.text == text[unit.start : unit.end] for unit in units)


def test_custom_spans_own_every_token_of_a_shared_character():
    text = "a 😀 b"
    offsets, _ = encode(text)
    (unit,) = split_units(text, offsets, [(2, 3)])
    touching = tuple(index for index, (start, end) in enumerate(offsets) if start < 3 and end > 2)
    assert unit.token_indices == touching
    assert len(touching) > 1


@given(st.text("ab 😀好\n", min_size=1, max_size=12), st.data())
def test_custom_spans_against_a_plain_loop(text, data):
    offsets, _ = encode(text)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    inside = [at for at in range(start, end) if not text[at].isspace()] or list(range(start, end))
    expected = tuple(
        token
        for token, (first, last) in enumerate(offsets)
        if any(first <= at < last for at in range(inside[0], inside[-1] + 1))
    )
    (unit,) = split_units(text, offsets, [(start, end)])
    assert unit == Unit(text[inside[0] : inside[-1] + 1], inside[0], inside[-1] + 1, expected)


# Properties

PIECES = [
    *SPECIALS, " ", "\n", "\r\n", "\n\n", "\t", "\u3000", ".", "? ", "!", "'", "-", "keeper", " rowed",
    "user\n", "Dr.", " 3.14", "好", "。", "😀", "👩‍👧", "e\u0301", "नमः", "สวัสดี", "コーヒー",
    "\u200b", "\ud800",
]  # fmt: skip
CHARACTERS = st.characters(exclude_categories=["Cs"])  # no surrogates
texts = st.lists(st.sampled_from(PIECES) | CHARACTERS, min_size=1, max_size=25).map("".join)


@given(texts, st.sampled_from(GRANULARITIES))
@settings(max_examples=300, deadline=None)
@example("<|im_start|>user\n<|im_end|>\n", "sentence")
@example("A\u3000. B\u2028.", "sentence")
def test_named_granularities_partition_the_tokens(text, granularity):
    text = text.replace("\ud800", "?")  # what reaches a tokenizer can be encoded
    offsets, special = encode(text)
    units = split_units(text, offsets, granularity, special=special)

    tokens = [token for unit in units for token in unit.token_indices]
    assert tokens == list(range(len(offsets)))  # each once, in reading order
    shown = set()
    for unit in units:
        assert unit.text == text[unit.start : unit.end] != ""
        shown |= set(range(unit.start, unit.end))
        if any(special[token] for token in unit.token_indices):
            assert len(unit.token_indices) == 1
            assert unit.text in SPECIALS
        elif granularity != "token":
            assert unit.text == unit.text.strip() or unit.text.isspace()
    assert all(at in shown for at, character in enumerate(text) if not character.isspace())


@given(texts)
@settings(deadline=None)
def test_granularities_nest(text):
    """Tokens of one sentence are in one paragraph."""
    text = text.replace("\ud800", "?")
    offsets, special = encode(text)
    paragraph = owners(split_units(text, offsets, "paragraph", special=special))
    for unit in split_units(text, offsets, "sentence", special=special):
        assert len({paragraph[token] for token in unit.token_indices}) == 1


@given(texts)
@settings(deadline=None)
def test_pieces_of_characters(text):
    """With a token per character, units are read off the text: nothing visible is lost, added or moved."""
    for granularity in GRANULARITIES[1:]:
        pieces = split_characters(text, granularity)
        assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)
    if not text.isspace():
        assert not any(re.search(r"\s", word) for word in split_characters(text, "word"))
        assert not any(re.search(r"\n[ \t]*\n", part) for part in split_characters(text, "paragraph"))


# Targets


def test_target_units_leave_out_the_last_token():
    text = " Paris, France"
    offsets = [(0, 6), (6, 7), (7, 14), (0, 0)]
    units = target_units(text, offsets, 40, token_texts=[" Paris", ",", " France", "</s>"])
    assert units == (
        Unit(" Paris", 0, 6, (40,), "target"),
        Unit(",", 6, 7, (41,), "target"),
        Unit(" France", 7, 14, (42,), "target"),
    )
    assert target_units("Paris", [(0, 5)], 3) == ()


# Errors

OFFSETS = [(0, 3), (3, 7)]
ERRORS = {
    "empty text": (("", [(0, 0)]), {}, r"text: got ''"),
    "text of another type": ((None, OFFSETS), {}, r"text: got None"),
    "no tokens": (("One Two", []), {}, r"offsets: got no tokens"),
    "offsets beyond the text": (("One", OFFSETS), {}, r"offsets\[1\]: got \(3, 7\), .*<= 3$"),
    "reversed offsets": (("One", [(2, 1)]), {}, r"offsets\[0\]: got \(2, 1\)"),
    "negative offsets": (("One", [(-1, 1)]), {}, r"offsets\[0\]: got \(-1, 1\)"),
    "offsets that are no pairs": (("One", [3]), {}, r"offsets\[0\]: got 3, expected a pair"),
    "special of another length": (("One Two", OFFSETS), {"special": [True]}, r"special: got 1 .*\(2\)"),
    "texts of another length": (("One Two", OFFSETS), {"token_texts": ["One"]}, r"token_texts: got 1 "),
    "unknown granularity": (("One Two", OFFSETS, "words"), {}, r"units: got 'words', .*token, word"),
    "units of another type": (("One Two", OFFSETS, 3), {}, r"units: got 3, .*spans"),
    "no language": (("One Two", OFFSETS, "sentence"), {"language": None}, r"language: got None"),
    "no spans": (("One Two", OFFSETS, []), {}, r"units: got an empty list"),
    "span beyond the text": (("One Two", OFFSETS, [(0, 1), (4, 8)]), {}, r"units\[1\]: got \(4, 8\)"),
    "negative span": (("One Two", OFFSETS, [(-3, 2)]), {}, r"units\[0\]: got \(-3, 2\)"),
    "reversed span": (("One Two", OFFSETS, [(5, 4)]), {}, r"units\[0\]: got \(5, 4\)"),
    "empty span": (("One Two", OFFSETS, [(4, 4)]), {}, r"units\[0\]: got \(4, 4\)"),
    "span that is no pair": (("One Two", OFFSETS, [(4, 5, 6, 7)]), {}, r"units\[0\]: got \(4, 5, 6, 7\), .*span"),
    "name that is no text": (
        ("One Two", OFFSETS, [(4, 5, 6)]),
        {},
        r"units\[0\]\[2\], its name, must be a text, got int 6",
    ),
    "name without a letter": (("One Two", OFFSETS, [(4, 5, " ")]), {}, r"units\[0\]\[2\], its name, is empty"),
    "span of fractions": (("One Two", OFFSETS, [(0.5, 2.0)]), {}, r"units\[0\]: got \(0.5, 2.0\), .*span"),
    "span without a token": (("One Two", [(0, 3)], [(4, 7)]), {}, r"units\[0\]: got \(4, 7\), 'Two'"),
}


@pytest.mark.parametrize(("arguments", "options", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        split_units(*arguments, **options)


@pytest.mark.parametrize("position", [-1, 1.0, True, None])
def test_a_wrong_first_position_is_named(position):
    with pytest.raises(InputError, match="first_position must be an integer >= 0, got"):
        target_units("One", [(0, 3)], position)


# Module


def test_examples_of_the_docstrings():
    result = doctest.testmod(units_module)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_sentence_splitter_is_imported_when_needed_only():
    code = (
        "import sys; from atman_kernels.planning.units import split_units;"
        "split_units('A b', [(0, 3)], 'paragraph'); assert 'sentencex' not in sys.modules;"
        "split_units('A b', [(0, 3)], 'sentence');"
        "assert 'sentencex' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
