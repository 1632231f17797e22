"""The drawings of docs/packs.md: `python docs/_site/drawings.py` writes them into docs/images.

Each has a ground of its own, so that it can be read on a light page and on a dark one.
"""

from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "images"
TOKENS = ("Rome", "is", "old.", "Paris", "is", "in", "…")
TARGET = "France"
INK, GROUND, LINE, KEPT, GONE = "#1f2430", "#fbfbfd", "#c3c7d1", "#e6e8ee", "#c62828"
VARIANTS = ("#ffb74d", "#81c784", "#64b5f6", "#ba68c8")
WIDTH, SIDE = 96, 40  # of a token's box, of a cell


class Drawing:
    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.name, self.title, self.size, self.parts = name, title, (width, height), []

    def box(self, x, y, width, height, fill, text="", dashed=False, bold=False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{LINE}"{dash}/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text, "middle", bold=bold)

    def text(self, x, y, text, anchor="start", size=15, fill=INK, bold=False) -> None:
        style = f'font-size="{size}" fill="{fill}" text-anchor="{anchor}"' + (' font-weight="700"' if bold else "")
        self.parts.append(f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>')

    def cross(self, x, y, width, height) -> None:
        left, top, right, bottom = x + 8, y + 8, x + width - 8, y + height - 8
        path = f"M{left} {top}L{right} {bottom}M{right} {top}L{left} {bottom}"
        self.parts.append(f'<path d="{path}" stroke="{GONE}" stroke-width="3" fill="none"/>')

    def line(self, x1, y1, x2, y2) -> None:
        self.parts.append(f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{INK}" stroke-width="1.5" fill="none"/>')

    def svg(self) -> str:
        width, height = self.size
        ground = f'<rect width="{width}" height="{height}" rx="8" fill="{GROUND}"/>'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="system-ui, sans-serif" role="img"><title>{escape(self.title)}</title>'
        )
        return "\n".join([head, ground, *self.parts, "</svg>", ""])


def base() -> Drawing:
    d = Drawing("packs-base", "The base run: every token once, its keys and values kept", 840, 170)
    d.text(20, 32, "one run over prompt and answer", bold=True)
    for i, token in enumerate((*TOKENS, TARGET)):
        d.box(20 + i * (WIDTH + 4), 50, WIDTH, 40, KEPT, token)
        d.box(20 + i * (WIDTH + 4), 98, WIDTH, 30, GROUND, f"k{i} v{i}", dashed=True)
    d.text(20, 155, "the keys and values of every layer are kept")
    return d


def variant() -> Drawing:
    d = Drawing("packs-variant", "A variant: what stands before the suppressed token cannot change", 840, 170)
    d.text(20, 32, "the variant without “Paris”", bold=True)
    for i, token in enumerate((*TOKENS, TARGET)):
        d.box(20 + i * (WIDTH + 4), 50, WIDTH, 40, KEPT if i < 3 else VARIANTS[0], token)
    d.cross(20 + 3 * (WIDTH + 4), 50, WIDTH, 40)
    d.line(20, 104, 20 + 3 * (WIDTH + 4) - 8, 104)
    d.text(20, 126, "prefix: as in the base run, reused")
    d.line(20 + 3 * (WIDTH + 4), 104, 816, 104)
    d.text(20 + 3 * (WIDTH + 4), 126, "suffix: can change, recomputed")
    d.text(20 + 3 * (WIDTH + 4), 150, "factor 0 on the key of “Paris”, for every row", fill=GONE)
    return d


def triangle() -> Drawing:
    d = Drawing("packs-triangle", "All variants: about half of the tokens are recomputed", 840, 330)
    d.text(20, 32, "one variant per token", bold=True)
    tokens = (*TOKENS, TARGET)
    for v in range(len(TOKENS)):
        for i, token in enumerate(tokens):
            fill = KEPT if i < v else VARIANTS[v % 4]
            d.box(20 + i * (WIDTH + 4), 46 + v * 34, WIDTH, 30, fill, token)
        d.cross(20 + v * (WIDTH + 4), 46 + v * 34, WIDTH, 30)
    d.text(
        20, 312, "grey: reused from the base run.  coloured: through the model again, about n²/2 tokens instead of n²"
    )
    return d


SUFFIXES = ((4, 4), (5, 3), (6, 2))  # prefix and suffix length of the variants in the drawn pack


def rows() -> list[tuple[int, int]]:
    """(variant, position) of every row of the drawn pack."""
    return [(v, p + i) for v, (p, s) in enumerate(SUFFIXES) for i in range(s)]


def pack() -> Drawing:
    d = Drawing("packs-pack", "A pack: the suffixes of several variants stand in one row", 840, 212)
    tokens = (*TOKENS, TARGET)
    d.text(20, 32, "the last three variants as one sequence", bold=True)
    width = 84
    for r, (v, position) in enumerate(rows()):
        x = 20 + r * (width + 5)
        d.box(x, 50, width, 40, VARIANTS[v], tokens[position])
        if position == SUFFIXES[v][0]:
            d.cross(x, 50, width, 40)
        d.text(x + width / 2, 118, str(v), "middle")
        d.text(x + width / 2, 150, str(position), "middle")
    d.text(
        20,
        172,
        "first line: row_variant, whose row it is.  second line: row_position, where it stands in its sequence,",
        size=14,
    )
    d.text(
        20,
        192,
        "which is what the model gets as position_ids.  suffix_starts = [0, 4, 7, 9], prefix_lengths = [4, 5, 6]",
        size=14,
    )
    return d


def mask() -> Drawing:
    d = Drawing("packs-mask", "What each row of the pack sees", 840, 480)
    tokens = (*TOKENS, TARGET)
    cell, left, top = 34, 120, 86
    d.text(left, 32, "keys of the base run", bold=True)
    d.text(left + 8 * cell + 30, 32, "keys of the pack itself", bold=True)
    for i in range(len(tokens)):
        d.text(left + i * cell + cell / 2, 58, str(i), "middle", 13)
    for r, (_, position) in enumerate(rows()):
        d.text(left + (8 + r) * cell + 30 + cell / 2, 58, str(position), "middle", 13)
    for r, (v, position) in enumerate(rows()):
        y = top - 14 + r * cell
        d.text(left - 12, y + 22, tokens[position], "end")
        for i in range(8):
            d.box(left + i * cell, y, cell - 3, cell - 3, KEPT if i < SUFFIXES[v][0] else GROUND)
        for other, (w, at) in enumerate(rows()):
            x = left + (8 + other) * cell + 30
            seen = w == v and at <= position
            d.box(x, y, cell - 3, cell - 3, VARIANTS[v] if seen else GROUND)
            if seen and at == SUFFIXES[v][0]:
                d.cross(x, y, cell - 3, cell - 3)
    bottom = top + 9 * cell + 14
    d.text(
        20,
        bottom,
        "Two intervals per row: of the base keys those before its variant’s suffix, of the pack its own variant’s",
    )
    d.text(20, bottom + 24, "rows up to itself. A crossed key is there, but its factor is 0: nobody sees it.")
    d.text(20, bottom + 48, "White is never computed: no mask is stored, the kernel knows the intervals.")
    return d


def shared() -> Drawing:
    d = Drawing("packs-shared", "A shared prefix: what variants have in common is run once", 840, 250)
    d.text(20, 32, "two questions about one passage, the same sentence suppressed in both", bold=True)
    d.box(20, 54, 170, 40, KEPT, "sentence 1")
    d.box(194, 54, 170, 40, VARIANTS[0], "sentence 2")
    d.cross(194, 54, 170, 40)
    d.box(368, 54, 170, 40, VARIANTS[0], "sentence 3")
    d.line(542, 74, 580, 74)
    d.line(560, 74, 560, 154)
    d.line(560, 154, 580, 154)
    d.box(584, 54, 236, 40, VARIANTS[1], "question A and its answer")
    d.box(584, 134, 236, 40, VARIANTS[2], "question B and its answer")
    d.line(194, 108, 538, 108)
    d.text(194, 130, "shared prefix: run once, leaves keys and values")
    d.text(20, 210, "To the kernels it is one more base: base_starts says which base each variant goes on from.")
    return d


ALL = (base, variant, triangle, pack, mask, shared)

if __name__ == "__main__":
    for drawing in ALL:
        drawn = drawing()
        (IMAGES / f"{drawn.name}.svg").write_text(drawn.svg(), encoding="utf-8")
