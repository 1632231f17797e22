"""An extension of Griffe: docstrings are written for Python's `help`, and read here as Markdown."""

import re

import griffe


class Readable(griffe.Extension):
    """Examples get the heading that Griffe knows, blocks of code Markdown's colon, and pages a link."""

    def on_object(self, *, obj, **_):
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        if "Examples:" not in text and (found := re.search(r"^>>> ", text, re.MULTILINE)):
            example = re.sub(r"^", "    ", text[found.start() :], flags=re.MULTILINE)
            text = f"{text[: found.start()]}Examples:\n{example}"
        text = re.sub(r" *# doctest: \+SKIP", "", text)
        text = re.sub(r"docs/(\w+)\.md", r"[\1](../\1.md)", text)
        obj.docstring.value = re.sub(r"::\n\n", ":\n\n", text)
