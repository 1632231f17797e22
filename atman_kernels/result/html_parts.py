"""What the HTML templates show of an explanation, in plain values: pieces of text, patches, lists, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atman_kernels.errors import InputError
from atman_kernels.result.characters import isolated, printable
from atman_kernels.result.data import ExplanationData
from atman_kernels.result.labels import about, give_or_take, label, likelihood, signed, token_label, unit_label
from atman_kernels.result.places import boxes_of, explained_size, reach
from atman_kernels.result.segments import Segment, nested_segments, outlined, strongest

TOP = 8  # rows in the list of what speaks for the answer


def content(explanation: ExplanationData, images: Any = None) -> dict[str, Any]:
    """What the templates show; the script takes over from `data` when a target token is selected."""
    total: list[float] = explanation.total.tolist()
    speaks_for, speaks_against = outlined(total, explanation.units, explanation.depths, TOP)
    errors = [None] * len(total) if explanation.standard_errors is None else explanation.standard_errors.tolist()
    tokens = [token_label(explanation, token) for token in range(len(explanation.target_tokens))]
    return {
        "explanation": explanation,
        "likelihood": likelihood(explanation),
        "tokens": tokens,
        "token_logprobs": explanation.base_logprobs.tolist(),
        "total": total,
        "errors": errors,
        "all_exact": all(map(explanation.is_exact, range(len(total)))),
        "scales": explanation.scales,
        "lists": [("Speaks for", speaks_for), ("Speaks against", speaks_against)],
        "summary": _summary(explanation),
        "details": [("Settings", _shown(explanation.settings)), ("Cost", _shown(explanation.stats))],
        "data": {
            "labels": [unit_label(unit, 60) for unit in explanation.units],
            "tokens": tokens,
            "total": _rounded(total),
            "scores": [_rounded(row) for row in explanation.scores.tolist()],
            "errors": [give_or_take(error) for error in errors],
            "about": [about(explanation, unit) for unit in range(len(total))],
            "parents": [unit.parent for unit in explanation.units] if explanation.levels else None,
            "depths": explanation.depths,
            **_side_data(explanation),
            "top": TOP,
            "suppressed": explanation.measures_suppression,
        },
        **texts_of(explanation, images),
        **_sides(explanation),
    }


def texts_of(explanation: ExplanationData, images: Any) -> dict[str, Any]:
    """The prompt, the answer and the images, each with its units painted."""
    painter = _Painter(explanation, explanation.total.tolist(), explanation.scales)
    return {
        "images": _images(explanation, painter, images),
        "texts": [painter.text(explanation.prompt, "prompt"), painter.text(explanation.target, "target")],
    }


class _Painter:
    """Pieces of a text as a template paints them, with one score per unit and one scale per level."""

    def __init__(self, explanation: ExplanationData, scores: Sequence[float], scales: Sequence[float]) -> None:
        self.explanation, self.scores, self.scales = explanation, scores, scales
        self._named: set[int] = set()

    def text(self, text: str, source: str) -> list[dict[str, Any]]:
        """A text, cut where its units begin and end."""
        explanation = self.explanation
        pieces = nested_segments(text, explanation.units, explanation.children, source)
        bands = explanation.has_bands and source == "prompt"
        return [self.piece(piece, bands) for piece in pieces if not bands or piece.units or piece.text.strip("\n")]

    def piece(self, piece: Segment, bands: bool) -> dict[str, Any]:
        """A piece below its strongest unit; bands stand one below the other, without the line breaks between them."""
        unit = strongest(piece.units, self.scores)
        if unit is None:
            return {"unit": None, "text": piece.text.strip("\n") if bands else piece.text}
        blank = "\n" in piece.text and not piece.text.strip()
        bands = bands and bool(piece.text)
        begun = [i for i in piece.units if self.explanation.units[i].name is not None and i not in self._named]
        self._named.update(begun)
        painted = self.unit(unit, ("open " if piece.inside else "") + ("band " if bands else ""), chip=not piece.text)
        return painted | {
            "units": piece.units,
            "text": printable(piece.text) if piece.text else unit_label(self.explanation.units[unit], 24),
            "breaks": "↵" * piece.text.count("\n") if blank else "",
            "name": " · ".join(unit_label(self.explanation.units[i]) for i in begun),
            "inside": [self.piece(each, bands=False) for each in piece.inside],
        }

    def unit(self, unit: int, more: str = "", *, chip: bool = False) -> dict[str, Any]:
        """What is said and painted of one unit."""
        score, depth = self.scores[unit], self.explanation.depths[unit]
        kinds = ["unit", *more.split(), "negative" if score < 0 else "", "chip" if chip else ""]
        kinds += [] if self.explanation.is_exact(unit) else ["estimate"]
        called = isolated(unit_label(self.explanation.units[unit]))
        return {
            "unit": unit,
            "units": (unit,),
            "classes": " ".join(filter(None, kinds)),
            "strength": 100 * abs(score) / self.scales[depth],
            "title": f"{called}: {about(self.explanation, unit)}{signed(score)}",
        }


def _sides(explanation: ExplanationData) -> dict[str, Any]:
    """Of a contrast, the prompt painted for either answer by itself, both on one scale."""
    if explanation.sides is None:
        return {"sides": []}
    both, answers = explanation.logprobs, (explanation.target, explanation.versus or "")
    logprobs = (None, None) if both is None else (both.target, both.versus)
    scales = _side_scales(explanation)
    shown = []
    for answer, logprob, scores in zip(answers, logprobs, explanation.sides.T.tolist(), strict=True):
        parts = _Painter(explanation, scores, scales).text(explanation.prompt, "prompt")
        shown.append({"answer": label(answer), "logprob": logprob, "parts": parts})
    return {"sides": shown, "side_scale": scales[0]}


def _side_data(explanation: ExplanationData) -> dict[str, Any]:
    if explanation.sides is None:
        return {"sides": None}
    answers = [label(answer, 24) for answer in (explanation.target, explanation.versus or "")]
    rounded = [_rounded(scores) for scores in explanation.sides.T.tolist()]
    return {"sides": rounded, "answers": answers, "side_scales": _side_scales(explanation)}


def _side_scales(explanation: ExplanationData) -> list[float]:
    """Per level the largest of both answers' totals in absolute value."""
    assert explanation.sides is not None
    sizes = explanation.sides.abs().amax(dim=1).tolist()
    levels = range(len(explanation.scales))
    return [max((sizes[i] for i in explanation.of_level(level)), default=0.0) or 1.0 for level in levels]


def _rounded(scores: Sequence[float]) -> list[float]:
    return [float(f"{score:.4g}") for score in scores]


def _images(explanation: ExplanationData, painter: _Painter, given: Any) -> list[dict[str, Any]]:
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
            painter.unit(i)
            | {
                "left": 100 * box[0] / width,
                "top": 100 * box[1] / height,
                "width": 100 * (box[2] - box[0]) / width,
                "height": 100 * (box[3] - box[1]) / height,
            }
            for i in own
            if (box := explanation.units[i].box)
        ]
        rest = [painter.piece(Segment("", (i,)), bands=False) for i in own if explanation.units[i].box is None]
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
    if explanation.levels:
        counts = [f"{len(explanation.of_level(level))} {name}" for level, name in enumerate(explanation.levels)]
        return [*parts, f"{', '.join(counts)} units"]
    kind = settings.get("units")
    return [*parts, f"{len(explanation.units)} {f'{kind} ' if isinstance(kind, str) else ''}units"]


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
