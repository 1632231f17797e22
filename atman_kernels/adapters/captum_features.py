"""From captum's inputs to units: which tokens each of its features holds."""

from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import TextTemplateInput, TextTokenInput  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from atman_kernels import arguments
from atman_kernels.errors import InputError
from atman_kernels.inputs.tokenization import UnitChoice, encode, special_flags
from atman_kernels.planning.units import Unit, split_units


@dataclass(frozen=True)
class Features:
    """The tokens of a captum input, and which of them each feature holds.

    Attributes:
        ids: (1, n) token ids.
        units: one per feature.
        values: what captum shows, one text per column of its results.
        spread: the unit of every value, where several values share one (a template's `mask`); else None.
    """

    ids: Tensor
    units: tuple[Unit, ...]
    values: list[str]
    spread: list[int] | None = None


def features_of(source: Any, tokenizer: Any, units: UnitChoice | None, language: str) -> Features:
    """The features of a text, or of a captum input, see `SuppressedTextInput`.

    Args:
        source: a text, a `TextTokenInput` or a `TextTemplateInput`; no subclass of theirs.
        tokenizer: the model's.
        units: of a text; None for its tokens.
        language: of a text, for sentence splitting.

    Raises:
        InputError: as `SuppressedTextInput`.
    """
    if isinstance(source, str):
        return _text_features(source, tokenizer, "token" if units is None else units, language)
    if units is not None:
        raise InputError(f"units are for texts; {type(source).__name__} brings its own features")
    # not isinstance: what a subclass makes of its features is not known
    if type(source) is TextTokenInput:
        return _token_features(source, tokenizer)
    if type(source) is TextTemplateInput:
        return _template_features(source, tokenizer)
    raise InputError(f"inp must be a text, a TextTokenInput or a TextTemplateInput, got {type(source).__name__}")


def _text_features(text: str, tokenizer: Any, units: UnitChoice, language: str) -> Features:
    text = arguments.text(text, "inp")
    encoded = encode(tokenizer, text, add_special_tokens=True)
    ids = encoded["input_ids"]
    found = split_units(
        text,
        encoded["offset_mapping"],
        units,
        special=special_flags(tokenizer, ids),
        token_texts=tokenizer.convert_ids_to_tokens(ids),
        language=language,
    )
    return Features(torch.tensor([ids], device="cpu"), found, [unit.name or unit.text for unit in found])


def _token_features(source: TextTokenInput, tokenizer: Any) -> Features:
    if source.baselines != 0:
        raise InputError(f"baselines must be 0, captum's default, as no token is replaced; got {source.baselines!r}")
    if source.tokenizer is not tokenizer and source.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError("inp was made with another tokenizer than the model's")
    kept = torch.ones_like(source.inp_tensor) if source.itp_mask is None else source.itp_mask
    positions = kept[0].nonzero()[:, 0].tolist()
    units = tuple(Unit(text, 0, 0, (at,)) for text, at in zip(source.values, positions, strict=True))
    return Features(source.inp_tensor, units, source.values)


def _template_features(source: TextTemplateInput, tokenizer: Any) -> Features:
    if callable(source.baselines) or any(source.baselines):
        raise InputError("baselines must be None: nothing is put in the place of a template's value")
    text = source.to_model_input()
    spans = _value_spans(source, text)
    features = _text_features(text, tokenizer, [span for found in spans for span in found], "en")
    owned = iter(features.units)
    tokens = [{token for _ in found for token in next(owned).token_indices} for found in spans]  # of every value
    spread = list(range(len(tokens))) if source.mask is None else source.formatted_mask
    units = []
    for feature in range(source.n_itp_features):
        members = [value for value, group in enumerate(spread) if group == feature]
        positions = set().union(*(tokens[value] for value in members))
        units.append(Unit(source.values[members[0]], 0, 0, tuple(sorted(positions))))
    return Features(features.ids, tuple(units), source.values, spread)


def _value_spans(source: TextTemplateInput, text: str) -> list[list[tuple[int, int]]]:
    """The characters of every value in the text, wherever the template puts it.

    The template is filled with values between characters of the private use planes, which tell where each went.

    Raises:
        InputError: a value is nowhere in the text, is empty, or the template does more than put values into a text.
    """
    first = 0xF0000
    marked = [f"{chr(first + 2 * i)}{value}{chr(first + 2 * i + 1)}" for i, value in enumerate(source.values)]
    keys = source.dict_keys
    filled = source.format_fn(**dict(zip(keys, marked, strict=True))) if keys else source.format_fn(*marked)
    spans: list[list[tuple[int, int]]] = [[] for _ in marked]
    plain, starts = [], {}
    for character in filled:
        mark = ord(character) - first
        if not 0 <= mark < 2 * len(marked):
            plain.append(character)
        elif mark % 2 == 0:
            starts[mark // 2] = len(plain)
        elif mark // 2 in starts:
            spans[mark // 2].append((starts.pop(mark // 2), len(plain)))
    for value, found in zip(source.values, spans, strict=True):
        if "".join(plain) != text or not found or any(text[start:end] != value or not value for start, end in found):
            raise InputError(f"template: its value {value!r} is no piece of its text, so no tokens can be suppressed")
    return spans
