"""Texts of single tokens: they join to the whole, and characters of several tokens stand with the last of them."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atman_kernels.inputs.token_texts import CONTEXT, LONGEST_WINDOW, token_texts_of

PIECES = ["the dog ", "🦊", "日本語", " ", "é", "\n", "doggy dogs. ", "👩‍🚀", "�", ", ", "x"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: bytes where there is no token, and a space before the first word that decoding takes away."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,日"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("d", "o")]
    vocabulary = {token: index for index, token in enumerate([*tokens, *map("".join, merges)])}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=fast)


def wordpiece() -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "dog": 1, "##gy": 2, "the": 3, ".": 4, "##s": 5, ",": 6, "x": 7}
    fast = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=fast)


@pytest.fixture(params=["bytes", "sentencepiece", "wordpiece"])
def tokenizer(request, tiny_tokenizer):
    return {"bytes": lambda: tiny_tokenizer, "sentencepiece": sentencepiece, "wordpiece": wordpiece}[request.param]()


def from_the_start(tokenizer, ids):
    """By definition: what the text of all tokens up to one has that it had not before."""
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if end < len(ids) and whole.endswith("�"):
            whole = shown
        pieces.append(whole[len(shown) :] if whole.startswith(shown) else tokenizer.decode(ids[end - 1 : end]))
        shown = whole
    return pieces


def test_same_as_from_the_start(tokenizer):
    draw = random.Random(0)
    for _ in range(60):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 20)))
        texts = tokenizer(text, add_special_tokens=False)["input_ids"]
        for ids in (texts, [draw.randrange(len(tokenizer)) for _ in range(draw.randint(1, 40))]):
            pieces, offsets = token_texts_of(tokenizer, ids)
            assert pieces == from_the_start(tokenizer, ids)
            assert [len(piece) for piece in pieces] == [end - start for start, end in offsets]
            assert [start for start, _ in offsets[1:]] == [end for _, end in offsets[:-1]]


def test_a_character_of_several_tokens(tiny_tokenizer):
    ids = tiny_tokenizer("a 🦊")["input_ids"]
    assert token_texts_of(tiny_tokenizer, ids)[0] == ["a", " ", "", "", "", "🦊"]


@pytest.mark.parametrize("text", ["the dog 🦊 ", "�"])
def test_each_token_is_decoded_with_a_few_others(tokenizer, text, monkeypatch):
    """Work in proportion to the tokens: 8,400 of them took 22 seconds when each was decoded with all before it."""
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"] * 300)[:600]
    decoded, decode = [], type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda self, ids, **how: (decoded.append(len(ids)), decode(self, ids, **how))[1]
    )
    pieces, _ = token_texts_of(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids, clean_up_tokenization_spaces=False)
    assert len(decoded) <= 3 * len(ids)
    assert max(decoded) <= (CONTEXT + 1) * (LONGEST_WINDOW + 1)
