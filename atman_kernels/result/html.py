"""Explanations as HTML: a fragment for notebooks, a page of its own, and a fragment for pages with a strict policy.

All of them are rendered here, without any outside resource, and readable where scripts do not run.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

import torch
from jinja2 import Environment, FunctionLoader, StrictUndefined

from atman_kernels.planning.units import Unit
from atman_kernels.result.characters import isolated, printable
from atman_kernels.result.data import ExplanationData
from atman_kernels.result.html_parts import content, texts_of
from atman_kernels.result.labels import about, give_or_take, label, measure_of, signed, unit_label


def fragment(explanation: ExplanationData) -> str:
    """The heatmap as one `<section>` with its own style and script, for any page, any number of times."""
    return _rendered("fragment.html", content(explanation), **_inline())


def page(explanation: ExplanationData, images: Any = None) -> str:
    """The heatmap as a complete page, whose security policy lets it load nothing and run only our script.

    Args:
        images: PIL images to embed below their patches; None draws the patches alone.
    """
    digest = base64.b64encode(hashlib.sha256(_file("explanation.js").encode()).digest()).decode()
    parts = content(explanation, images)
    return _rendered("page.html", parts, script_hash=f"sha256-{digest}", **_inline())


def bare_fragment(explanation: ExplanationData) -> str:
    """The heatmap as one `<section>` for a page that has explanation.css and runs explanation.js itself.

    It has no style, script or image in it: what would be a `style` attribute, which a strict policy forbids, is a
    `data-style` that the script applies.
    """
    return _rendered("fragment.html", content(explanation), style="", script="", styled="data-style")


def unfinished(prompt: str, target: str, units: tuple[Unit, ...], levels: tuple[str, ...] = ()) -> str:
    """What there is to show before any score is known, for a page as of `bare_fragment`, which paints it.

    Args:
        prompt, target, units, levels: see `Explanation`.

    Raises:
        InputError: the units do not fit the texts.
    """
    nothing = torch.zeros(len(units) + 1, 1, dtype=torch.float32, device="cpu")
    explanation = ExplanationData(
        prompt, target, units, nothing[1:], (target,), nothing[0], settings={}, stats={}, levels=levels
    )
    return _rendered("unfinished.html", {"explanation": explanation} | texts_of(explanation, None), styled="data-style")


def _inline() -> dict[str, str]:
    return {"style": _file("explanation.css"), "script": _file("explanation.js"), "styled": "style"}


def _rendered(template: str, parts: dict[str, Any], **more: str) -> str:
    return _environment().get_template(template).render(parts, **more)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_file),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "give_or_take": give_or_take,
        "isolated": isolated,
        "label": label,
        "unit_label": unit_label,
    }
    environment.filters |= {"about": about, "measure_of": measure_of, "printable": printable, "signed": signed}
    return environment


@cache
def _file(name: str) -> str:
    return (resources.files("atman_kernels.result") / name).read_text(encoding="utf-8")
