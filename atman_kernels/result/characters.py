"""Control and invisible characters made visible; all others stay as they are."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

# Names that people know. Everything else that cannot be seen is shown by its code point.
NAMES = {
    0x00AD: "SHY",
    0x034F: "CGJ",
    0x061C: "ALM",
    0x00A0: "NBSP",
    0x200B: "ZWSP",
    0x200C: "ZWNJ",
    0x200D: "ZWJ",
    0x200E: "LRM",
    0x200F: "RLM",
    0x202A: "LRE",
    0x202B: "RLE",
    0x202C: "PDF",
    0x202D: "LRO",
    0x202E: "RLO",
    0x202F: "NNBSP",
    0x2060: "WJ",
    0x2066: "LRI",
    0x2067: "RLI",
    0x2068: "FSI",
    0x2069: "PDI",
    0xFEFF: "BOM",
}
FSI, PDI = "\u2068", "\u2069"
LONGEST_PIECE = 16  # characters; families of emoji have 11, marks can be piled up without end
BLANK = "\u2800"  # the braille pattern without dots

# What Unicode calls default ignorable (DerivedCoreProperties, Default_Ignorable_Code_Point) and is no joiner, selector
# or tag; separators of lines, annotations, joiners of hieroglyphs, noncharacters, halves of surrogate pairs; and
# private characters, of which nobody knows what they look like.
_UNSEEN = (
    "\u0080-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ufeff\uffa0\ufff0-\ufffb\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff\ue000-\uf8ff"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000\U000e0002-\U000e001f\U000e0080-\U000e00ff"
    "\U000e01f0-\U000e0fff\U000f0000-\U0010ffff"
    + "".join(chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(1, 15))
)
_JOINERS = "\u200c\u200d"
_SELECTORS = "\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
_TAGS = "\U000e0001\U000e0020-\U000e007f"
# The flags of England, Scotland and Wales are all that tags are in use for.
_FLAG = "\U0001f3f4\U000e0067\U000e0062(?:{})\U000e007f".format(
    "|".join("".join(chr(0xE0000 + ord(letter)) for letter in nation) for nation in ("eng", "sct", "wls"))
)
_HIDDEN = re.compile(f"{_FLAG}|[\x00-\x08\x0b-\x1f\x7f{_UNSEEN}{_JOINERS}{_SELECTORS}{_TAGS}]")
_RIGHT_TO_LEFT = ("R", "AL", "AN")


def printable(text: str) -> str:
    """Text for a terminal or a page, without characters that these would obey; line feeds and tabs stay.

    Control characters become their symbols (␛). Invisible ones, and those that turn the direction of writing, become
    their name or code point (⟨RLO⟩, ⟨U+E0041⟩). Joiners and variation selectors stay where a script or emoji has them.

    Example:
        >>> printable("\\u202e001\\u200b")
        '⟨RLO⟩001⟨ZWSP⟩'
    """
    return "".join(pieces(text)) if _HIDDEN.search(text) else text


def pieces(text: str) -> list[str]:
    """The text as `printable` shows it, in pieces that must not be cut: a character with its marks, or a name."""
    found: list[str] = []
    position = 0
    while position < len(text):
        flag = _HIDDEN.match(text, position)
        if flag is None or len(flag[0]) > 1:
            shown = flag[0] if flag else text[position]
            attached = flag is None and unicodedata.category(shown)[0] == "M" and bool(found)
        else:
            attached = _belongs(text, position)
            shown = flag[0] if attached else name(flag[0])
        if found and len(found[-1]) < LONGEST_PIECE and (attached or found[-1][-1] == "\u200d"):
            found[-1] += shown
        else:
            found.append(shown)
        position += len(flag[0]) if flag else 1
    return found


def name(character: str) -> str:
    """How a character is shown that cannot be seen itself."""
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨{NAMES.get(code) or f'U+{code:04X}'}⟩"


def supported(text: str) -> str:
    """The text with a circle below a mark at its beginning, which would stand on whatever comes before it."""
    return f"◌{text}" if text and unicodedata.category(text[0])[0] == "M" else text


def isolated(text: str) -> str:
    """Text between isolating marks if any of it is written from right to left; its neighbours keep their places."""
    turned = any(unicodedata.bidirectional(character) in _RIGHT_TO_LEFT for character in text)
    return f"{FSI}{text}{PDI}" if turned else text


def _belongs(text: str, position: int) -> bool:
    """Whether a joiner or variation selector does its work here, between characters that can be seen."""
    code, before = ord(text[position]), text[position - 1] if position else ""
    after = text[position + 1 : position + 2]
    if not before or not re.match(f"[{_JOINERS}{_SELECTORS}]", text[position]):
        return False
    if code in (0x200C, 0x200D):
        emoji = code == 0x200D and _is_emoji(before) and _is_emoji(after)
        return emoji or (_is_joined(before) and _is_joined(after))
    if code in (0xFE0E, 0xFE0F):
        return before in "#*0123456789" or unicodedata.category(before) in ("So", "Sm", "Po", "Sc")
    if 0x180B <= code <= 0x180F:
        return 0x1800 <= ord(before) <= 0x18AF and before not in "\u180b\u180c\u180d\u180f"
    return unicodedata.category(before) in ("Lo", "Sm")


def _is_emoji(character: str) -> bool:
    """What stands beside a joiner in an emoji: a symbol, a skin tone, or a selector."""
    return bool(character) and (character == "\ufe0f" or unicodedata.category(character) in ("So", "Sk"))


@cache
def _is_joined(character: str) -> bool:
    """Letters and marks of scripts that are written with joiners: Arabic to Sinhala, Myanmar, Mongolian."""
    if not character or unicodedata.category(character)[0] not in "LM":
        return False
    return any(
        first <= ord(character) <= last for first, last in ((0x0600, 0x0DFF), (0x1000, 0x109F), (0x1800, 0x18AF))
    )
