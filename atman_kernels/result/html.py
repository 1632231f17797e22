"""Explanations as HTML: a fragment for notebooks and a page of its own, both without any outside resource."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from atman_kernels.errors import InputError
from atman_kernels.result.characters import isolated, printable
from atman_kernels.result.data import ExplanationData
from atman_kernels.result.labels import about, give_or_take, label, likelihood, measure_of, signed, token_label
from atman_kernels.result.places import boxes_of, explained_size, reach
from atman_kernels.result.segments import ranked, segments, strongest

TOP = 8  # rows in the list of what speaks for the answer


def fragment(explanation: ExplanationData) -> str:
    """The heatmap as one `<section>` with its own style and script, for any page, any number of times."""
    return _environment().get_template("fragment.html").render(_content(explanation))


def page(explanation: ExplanationData, images: Any = None) -> str:
    """The heatmap as a complete page, whose security policy lets it load nothing and run only our script.

    Args:
        images: PIL images to embed below their patches; None draws the patches alone.
    """
    digest = base64.b64encode(hashlib.sha256(_file("explanation.js").encode()).digest()).decode()
    template = _environment().get_template("page.html")
    return template.render(_content(explanation, images), script_hash=f"sha256-{digest}")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_file),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"give_or_take": give_or_take, "isolated": isolated, "label": label}
    environment.filters |= {"about": about, "measure_of": measure_of, "printable": printable, "signed": signed}
    return environment


@cache
def _file(name: str) -> str:
    return (resources.files("atman_kernels.result") / name).read_text(encoding="utf-8")


def _content(explanation: ExplanationData, images: Any = None) -> dict[str, Any]:
    """What the templates show; the script takes over from `data` when a target token is selected."""
    total: list[float] = explanation.total.tolist()
    scale = max(map(abs, total)) or 1.0
    speaks_for, speaks_against = ranked(total, TOP)
    errors = [None] * len(total) if explanation.standard_errors is None else explanation.standard_errors.tolist()
    tokens = [token_label(explanation, token) for token in range(len(explanation.target_tokens))]

    def painted(text: str, source: str) -> list[dict[str, Any]]:
        """The pieces of a text, each with its strongest unit and that unit's score."""
        pieces = []
        for piece in segments(text, explanation.units, source):
            unit = strongest(piece.units, total)
            pieces.append({"piece": piece, "unit": unit, "score": 0.0 if unit is None else total[unit]})
        return pieces

    return {
        "explanation": explanation,
        "likelihood": likelihood(explanation),
        "tokens": tokens,
        "token_logprobs": explanation.base_logprobs.tolist(),
        "total": total,
        "errors": errors,
        "all_exact": all(map(explanation.is_exact, range(len(total)))),
        "scale": scale,
        "images": _images(explanation, total, images),
        "texts": [painted(explanation.prompt, "prompt"), painted(explanation.target, "target")],
        "lists": [("Speaks for", speaks_for), ("Speaks against", speaks_against)],
        "summary": _summary(explanation),
        "details": [("Settings", _shown(explanation.settings)), ("Cost", _shown(explanation.stats))],
        "style": _file("explanation.css"),
        "script": _file("explanation.js"),
        "data": {
            "labels": [label(unit.text, 60) for unit in explanation.units],
            "tokens": tokens,
            "total": [float(f"{score:.4g}") for score in total],
            "scores": [[float(f"{score:.4g}") for score in row] for row in explanation.scores.tolist()],
            "errors": [give_or_take(error) for error in errors],
            "about": [about(explanation, unit) for unit in range(len(total))],
            "top": TOP,
            "suppressed": explanation.measures_suppression,
        },
    }


def _images(explanation: ExplanationData, total: list[float], given: Any) -> list[dict[str, Any]]:
    """Per explained image its size, its units with their boxes in per cent of it, and its pixels where given."""
    of_images = [i for i, unit in enumerate(explanation.units) if unit.source == "image"]
    numbers = sorted({explanation.units[i].image for i in of_images})
    given = [None] * len(numbers) if given is None else given
    given = list(given) if isinstance(given, list | tuple) else [given]
    if len(given) != len(numbers):
        raise InputError(f"images has {len(given)}, but the explanation has units of {len(numbers)} images")
    images = []
    for number, image in zip(numbers, given, strict=True):
        source = None if image is None else _embedded(explanation, image, number)
        own = [i for i in of_images if explanation.units[i].image == number]
        size = explained_size(explanation, number)
        if size is None:
            size = reach(boxes_of(explanation, number)) if image is None else image.size
        width, height = size
        placed = [
            {
                "unit": i,
                "score": total[i],
                "left": 100 * box[0] / width,
                "top": 100 * box[1] / height,
                "width": 100 * (box[2] - box[0]) / width,
                "height": 100 * (box[3] - box[1]) / height,
            }
            for i in own
            if (box := explanation.units[i].box)
        ]
        rest = [{"unit": i, "score": total[i]} for i in own if explanation.units[i].box is None]
        images.append(
            {"number": number + 1, "source": source, "width": width, "height": height, "placed": placed, "rest": rest}
        )
    return images


def _embedded(explanation: ExplanationData, image: Any, index: int) -> str:
    from atman_kernels.result.overlay import check_image, data_uri

    check_image(explanation, image, index)
    return data_uri(image)


def _summary(explanation: ExplanationData) -> list[str]:
    settings = explanation.settings
    parts = [str(settings[key]) for key in ("model", "method", "mode") if settings.get(key)]
    if settings.get("factor") is not None:
        parts.append(f"factor {settings['factor']:g}")
    kind = settings.get("units")
    parts.append(f"{len(explanation.units)} {f'{kind} ' if isinstance(kind, str) else ''}units")
    return parts


def _shown(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, _in_words(value)) for key, value in values.items()]


def _in_words(value: Any, levels: int = 8) -> str:
    """A JSON value without its punctuation; what is nested too deep to read is left out."""
    if value is None:
        return "none"
    if isinstance(value, dict | list) and not levels:
        return "…"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(member, levels - 1)}" for key, member in value.items())
    if isinstance(value, list):
        return ", ".join(_in_words(member, levels - 1) for member in value)
    return str(value)
