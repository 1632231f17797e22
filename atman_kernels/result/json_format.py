"""Explanations as JSON: what is written is read back exactly.

Version 2 has every field of `ExplanationData` under its name. Version 1 kept `measure`, `value`, `versus`, `logprobs`
and `images` in the settings alone; the constructor takes them from there. Version 3 is that of nested units, whose
scores are of several levels: what reads version 2 alone refuses it, and does not take them for one. A field added later
has a default, which holds where a file has none.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Any

import torch

from atman_kernels.errors import InputError
from atman_kernels.planning.units import Unit
from atman_kernels.result.data import AnswerLogprobs, ExplanationData, ImageSize, as_json

FORMAT = "atman-explanation"
VERSION = 2
NESTED = 3


def json_line(explanation: ExplanationData) -> str:
    """An explanation as one line of JSON in ASCII characters."""
    content: dict[str, Any] = {"format": FORMAT, "version": NESTED if explanation.levels else VERSION}
    content |= {field.name: as_json(getattr(explanation, field.name)) for field in fields(ExplanationData)}
    return json.dumps(content, allow_nan=False) + "\n"


def values_from_json(content: Any) -> dict[str, Any]:
    """The fields in parsed JSON of any origin, to build an explanation from.

    Raises:
        InputError: whatever is wrong with the form; what is wrong with the values, the constructor finds.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise InputError(f'not an explanation: expected "format": "{FORMAT}", found {found!r}')
    if content.get("version") not in range(1, NESTED + 1):
        raise InputError(f"version {content.get('version')!r} cannot be read, only versions 1 to {NESTED}")
    known = fields(ExplanationData)
    missing = [field.name for field in known if field.name not in content and field.default is MISSING]
    if missing:
        raise InputError(f"missing {', '.join(missing)}")
    values = {field.name: content[field.name] for field in known if field.name in content}
    try:
        values["units"] = units_from_json(values["units"])
        values["target_tokens"] = tuple(_list("target_tokens", values["target_tokens"]))
        further = [name for name in ("standard_errors", "sides") if values.get(name) is not None]
        for name in ("scores", "base_logprobs", *further):
            values[name] = torch.tensor(_list(name, values[name]), dtype=torch.float32, device="cpu")
        values["images"] = tuple(ImageSize(**size) for size in _list("images", values.get("images", [])))
        if values.get("exact") is not None:
            values["exact"] = tuple(_list("exact", values["exact"]))
        values["levels"] = tuple(_list("levels", values.get("levels", [])))
        if values.get("logprobs") is not None:
            values["logprobs"] = AnswerLogprobs(**values["logprobs"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"a field has the wrong form: {error}") from error
    return values


def units_from_json(units: Any) -> tuple[Unit, ...]:
    """Units in parsed JSON of any origin; raises TypeError, ValueError or KeyError where they have another form."""
    return tuple(map(_unit_from_json, _list("units", units)))


def _unit_from_json(unit: dict[str, Any]) -> Unit:
    added_later = {"box": None, "image": 0, "name": None, "parent": None}
    values = added_later | {field.name: unit[field.name] for field in fields(Unit) if field.name not in added_later}
    values |= {name: unit[name] for name in added_later if name in unit}
    for name in ("token_indices", "box"):
        values[name] = None if values[name] is None else tuple(_list(name, values[name]))
    return Unit(**values)


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{name} must be a list, got {type(value).__name__}")
    return value
