"""What people see in pages and terminals: complete, safe, and the same story as the numbers."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from atman_kernels.planning.units import Unit
from atman_kernels.result.characters import isolated, printable
from atman_kernels.result.explanation import Explanation
from atman_kernels.result.labels import label, percent, signed
from atman_kernels.result.segments import Segment, ranked, segments, strongest
from atman_kernels.result.terminal import print_explanation

# What Unicode calls format characters, and fonts draw: signs around numbers in Arabic, Syriac and Kaithi.
VISIBLE_FORMATS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
HOSTILE = "</script><img src=x onerror=alert(1)> {{ 7*7 }} {% raw %} <!-- &amp; \"' \x1b[31mred\x07 ]]>\n\n\tend"


def spanning(prompt: str, *texts: str) -> tuple[Unit, ...]:
    return tuple(Unit(text, prompt.index(text), prompt.index(text) + len(text), (i,)) for i, text in enumerate(texts))


def explain(prompt: str, units: tuple[Unit, ...], scores: list[list[float]], **changes: Any) -> Explanation:
    tokens = len(scores[0])
    fields: dict[str, Any] = {
        "prompt": prompt,
        "target": "yes",
        "units": units,
        "scores": torch.tensor(scores),
        "target_tokens": tuple(f"t{i}" for i in range(tokens)),
        "base_logprobs": torch.full((tokens,), -0.5),
        "settings": {},
        "stats": {},
    }
    return Explanation(**fields | changes)


def sky() -> Explanation:
    prompt = "The sky was clear, not grey."
    units = spanning(prompt, "The", " sky", " clear", " not grey")
    return explain(prompt, units, [[0.1, 0.0], [2.0, -1.0], [0.5, 3.5], [-0.25, -1.75]])


class TestSegments:
    def test_overlap_gaps_and_units_without_characters(self):
        units = [
            Unit("<s>", 0, 0, (0,)),
            Unit("bcd", 1, 4, (1,)),
            Unit("cde", 2, 5, (2,)),
            Unit("</s>", 6, 6, (3,)),
            Unit("answer", 0, 6, (4,), "target"),
        ]
        assert segments("abcdef", units) == [
            Segment("", (0,)),
            Segment("a", ()),
            Segment("b", (1,)),
            Segment("cd", (1, 2)),
            Segment("e", (2,)),
            Segment("f", ()),
            Segment("", (3,)),
        ]
        assert segments("answer", units, "target") == [Segment("answer", (4,))]

    def test_tokens_that_are_parts_of_one_character_share_it(self):
        assert segments("é", [Unit("�", 0, 1, (0,)), Unit("�", 0, 1, (1,))]) == [Segment("é", (0, 1))]

    def test_empty_text(self):
        assert segments("", [Unit("<s>", 0, 0, (0,))]) == [Segment("", (0,))]
        assert segments("", []) == []

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # which a busy machine fails
    @given(st.data(), st.text(max_size=12))
    def test_every_character_once_and_every_unit_whole(self, data, text):
        places = st.integers(0, len(text))
        spans = data.draw(st.lists(st.tuples(places, places).map(sorted), max_size=8))
        units = [Unit("u", start, end, (0,)) for start, end in spans]
        pieces = segments(text, units)
        assert "".join(piece.text for piece in pieces) == text
        for i, (start, end) in enumerate(spans):
            assert "".join(piece.text for piece in pieces if i in piece.units) == text[start:end]
            at = [position for position, piece in _placed(pieces) if i in piece.units]
            assert at
            assert at[0] == start

    def test_strongest_is_by_size(self):
        assert strongest((0, 1, 2), [1.0, -3.0, 2.0]) == 1
        assert strongest((), [1.0]) is None

    def test_ranked_lists_both_sides_and_leaves_noise_out(self):
        assert ranked([1.0, -2.0, 100.0, 0.5, -50.0, 3.0, -4.0, -3.0], top=4) == ([2, 5], [4, 6])
        assert ranked([0.0, 0.0], top=4) == ([], [])


def _placed(pieces: list[Segment]) -> list[tuple[int, Segment]]:
    position, placed = 0, []
    for piece in pieces:
        placed.append((position, piece))
        position += len(piece.text)
    return placed


class TestLabels:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (" France", "France"),
            ("\n\n", "↵↵"),
            ("  ", "␣␣"),
            ("", "∅"),
            ("\t", "⇥"),
            ("a\nb", "a↵b"),
            ("\x1b[31m\x07\r\x7f\x9b\ud800", "␛[31m␇␍␡⟨U+009B⟩⟨U+D800⟩"),
            ("x" * 41, "x" * 20 + "…" + "x" * 19),
            ("\u202e001", "⟨RLO⟩001"),
            ("\u200b", "⟨ZWSP⟩"),
            ("\u3000", "⟨U+3000⟩"),
            ("\u3000 東\u3000京", "⟨U+3000⟩ 東\u3000京"),
            ("\xa0 ", "⟨NBSP⟩"),
            ("\xa0 \xa0", "⟨NBSP⟩␣⟨NBSP⟩"),
            ("\u2800", "⟨U+2800⟩"),
            ("\U000e0041\U000e0042", "⟨U+E0041⟩⟨U+E0042⟩"),
            ("\u200d", "⟨ZWJ⟩"),
            ("\ufe0f", "⟨U+FE0F⟩"),
            ("\u0301", "◌\u0301"),
            ("\n  x", "↵  x"),
            ("ab\u202e" * 8, "ab⟨RLO⟩ab⟨RLO⟩ab…⟨RLO⟩ab⟨RLO⟩ab⟨RLO⟩"),  # a name is never cut
            ("👩‍🚀" * 20, "👩‍🚀" * 6 + "…" + "👩‍🚀" * 6),
        ],
    )
    def test_label(self, text, shown):
        assert label(text) == shown
        assert len(shown) <= 40

    @pytest.mark.parametrize(
        "text",
        [
            "tab\tand\nline, שלום 👩‍🚀",
            "❤️ 1️⃣ ©️ 🏳️‍🌈 👨🏽‍👩🏽‍👧🏽 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
            "می‌خواهم क्‍ष ශ්‍රී",
            "葛\U000e0100 e\u0301 � ◌ ⟨RLO⟩",
        ],
    )
    def test_printable_keeps_what_is_text(self, text):
        assert printable(text) == text

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("cat\u200ddog", "cat⟨ZWJ⟩dog"),
            ("日\u200d本", "日⟨ZWJ⟩本"),
            ("می\u200c ", "می⟨ZWNJ⟩ "),
            ("a\ufe01", "a⟨U+FE01⟩"),
            ("❤\ufe0f\ufe0f", "❤\ufe0f⟨U+FE0F⟩"),
            ("👩\u200d", "👩⟨ZWJ⟩"),
            ("🏴\U000e0068\U000e0069\U000e007f", "🏴⟨U+E0068⟩⟨U+E0069⟩⟨U+E007F⟩"),
            ("a\u2028b\x85", "a⟨U+2028⟩b⟨U+0085⟩"),
            ("\uf8ff\ufdd0\U0010ffff", "⟨U+F8FF⟩⟨U+FDD0⟩⟨U+10FFFF⟩"),
        ],
    )
    def test_what_hides_is_named(self, text, shown):
        assert printable(text) == shown

    def test_no_character_is_obeyed_or_looks_like_nothing(self):
        """By Unicode's own categories, for every character there is."""
        kept = {"\n", "\t"}
        for character in map(chr, range(0x110000)):
            drawn = character in VISIBLE_FORMATS
            if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and character not in kept:
                assert drawn or character not in printable(f"a{character}b"), f"{ord(character):04X}"
            if character.isspace() or (unicodedata.category(character) in ("Cf", "Mn") and not drawn):
                assert label(character) not in (character, ""), f"{ord(character):04X}"

    def test_time_grows_with_the_text(self):
        for text in ("a" * 200_000, "\u200b" * 50_000, "a\u0301\u200d" * 20_000, " \u3000" * 50_000):
            assert len(label(text)) <= 40

    def test_isolated(self):
        assert isolated("clear") == "clear"
        assert isolated("שלום") == "\u2068שלום\u2069"
        assert isolated("a ١") == "\u2068a ١\u2069"

    @pytest.mark.parametrize(
        ("value", "shown"),
        [(2.345, "+2.35"), (-0.5, "−0.50"), (0.004, "+0.004"), (0.0, "0.00"), (-3e-6, "−3e-06")],
    )
    def test_signed(self, value, shown):
        assert signed(value) == shown

    @pytest.mark.parametrize(
        ("logprob", "shown"),
        [(0.0, "100 %"), (-0.0001, "100 %"), (-0.7, "50 %"), (-5.0, "0.67 %"), (-23.1, "10⁻¹⁰")],
    )
    def test_percent(self, logprob, shown):
        assert percent(logprob) == shown


class Page(HTMLParser):
    """A page as a browser would read it: its elements, the prompt's text, and the script's data."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []  # of each element of class "text", without the chips
        self.scripts: list[str] = []
        self.visible = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("meta", "img"):
            return
        self._open.append(f"{tag} {dict(attrs).get('class', '')}")
        if self._open[-1] == "div text":
            self.texts.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self._open and not self._open.pop().startswith(f"{tag} "):
            pass

    def handle_data(self, data):
        where = self._open[-1] if self._open else ""
        if where.startswith("script"):
            self.scripts[-1] += data
        elif not where.startswith("style"):
            self.visible += data
        if "div text" in self._open and "chip" not in where:
            self.texts[-1] += data

    def spans(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if "data-units" in attributes]


class TestHtml:
    def test_prompt_stays_as_it_is_and_nothing_in_it_becomes_markup(self):
        units = (Unit("<s>", 0, 0, (0,)), *spanning(HOSTILE, HOSTILE, "</script>", "\n\n", " {{ 7*7 }}"))
        explanation = explain(
            HOSTILE,
            units,
            [[1.0, 0.0]] * len(units),
            target=HOSTILE,
            target_tokens=(HOSTILE, "</script>"),
            settings={"model": HOSTILE, HOSTILE: [HOSTILE]},
            stats={HOSTILE: HOSTILE},
        )
        page = Page(explanation.to_html())
        assert page.texts == [printable(HOSTILE)]
        tags = [tag for tag, _ in page.elements]
        assert "img" not in tags
        assert tags.count("script") == 2
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        assert json.loads(page.scripts[0])["tokens"][1] == "</script>"
        assert "49" not in page.visible

    def test_every_label_is_isolated(self):
        """What is written from right to left, or turns the direction, moves nothing beside it."""
        texts = ["שלום", "\u202e001", "\u2066x", "مرحبا"]
        prompt = "".join(texts)
        units = (Unit("שלום", 0, 0, (0,)), *spanning(prompt, *texts))
        explanation = explain(
            prompt,
            units,
            [[1.0, 2.0]] * 5,
            target_tokens=("שלום", "\u202e001"),
            settings={"model": "שלום", "שלום": "\u202e"},
        )
        html = explanation.to_html()
        assert not re.search("[\u202a-\u202e\u2066\u2067]", html)
        isolating = ("bdi", "title", "unit", "script")  # units are the text itself, in a block of their own
        for found in re.finditer("שלום|⟨RLO⟩|مرحبا", html.partition('type="application/json"')[0]):
            before = html[: found.start()]
            tag = re.findall(r"<(\w+)[^<>]*>?[^<>]*$", before)[-1]
            inside_title = before.rpartition('title="')[2].find('"') < 0
            assert tag in isolating or 'class="unit' in before[before.rindex("<") :] or inside_title, before[-200:]
            if inside_title and found[0] != "⟨RLO⟩":
                assert before.endswith("\u2068")
        assert ".chip" in html
        assert "unicode-bidi: isolate" in html

    def test_units_with_no_characters_are_chips(self):
        units = (Unit("<|begin|>", 0, 0, (0,)), Unit("ab", 0, 2, (1,)), Unit("", 2, 2, (2,)))
        html = explain("ab", units, [[1.0]] * 3).to_html()
        page = Page(html)
        assert [span["class"] for span in page.spans()] == ["unit chip", "unit", "unit chip"]
        assert page.texts == ["ab"]
        assert "&lt;|begin|&gt;" in html

    def test_colours_follow_the_totals(self):
        strength = [(span["class"], span["style"]) for span in Page(sky().to_html()).spans()]
        assert strength == [
            ("unit", "--strength:2.5%"),
            ("unit", "--strength:25.0%"),
            ("unit", "--strength:100.0%"),
            ("unit negative", "--strength:50.0%"),
        ]

    def test_where_units_overlap_the_strongest_shows(self):
        explanation = explain("abc", (Unit("ab", 0, 2, (0,)), Unit("bc", 1, 3, (1,))), [[1.0], [-4.0]])
        shown = [(span["data-units"], span["class"]) for span in Page(explanation.to_html()).spans()]
        assert shown == [("0", "unit"), ("0 1", "unit negative"), ("1", "unit negative")]

    def test_text_that_is_no_unit_is_there_but_not_coloured(self):
        page = Page(sky().to_html())
        assert page.texts == [sky().prompt]
        assert len(page.spans()) == 4

    def test_answer_units_colour_the_answer(self):
        units = (Unit("ab", 0, 2, (0,)), Unit("ye", 0, 2, (1,), "target"))
        assert Page(explain("ab", units, [[1.0], [2.0]]).to_html()).texts == ["ab", "yes"]
        assert Page(explain("ab", units[:1], [[1.0]]).to_html()).texts == ["ab"]

    def test_data_of_the_script(self):
        data = json.loads(Page(sky().to_html()).scripts[0])
        assert data["scores"] == [[0.1, 0.0], [2.0, -1.0], [0.5, 3.5], [-0.25, -1.75]]
        assert data["total"] == [0.1, 1.0, 4.0, -2.0]
        assert data["labels"] == ["The", "sky", "clear", "not grey"]

    def test_log_probabilities_are_visible(self):
        visible = Page(
            explain("a", spanning("a", "a"), [[1.0, 1.0]], base_logprobs=torch.tensor([-0.3, -0.4])).to_html()
        ).visible
        for shown in ("log p −0.70 · 50 %", "−0.30", "−0.40"):
            assert shown in visible

    def test_lists_name_the_strongest_first(self):
        rows = [
            attributes["data-unit"] for _, attributes in Page(sky().to_html()).elements if "data-unit" in attributes
        ]
        assert rows == ["2", "1", "0", "3"]

    def test_nothing_comes_from_outside(self):
        html = sky().to_html()
        page = Page(html)
        assert not [name for _, attributes in page.elements for name in attributes if name in ("src", "href")]
        assert "url(" not in html
        assert "@import" not in html
        policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
        digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
        assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"

    def test_copies_in_a_notebook_cannot_collide(self):
        fragment = sky()._repr_html_()
        assert not [attributes for _, attributes in Page(fragment).elements if "id" in attributes]
        style = fragment.partition("<style>")[2].partition("</style>")[0]
        selectors = re.findall(r"([^{}]+)\{", re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL))
        assert len(selectors) > 20
        assert not [s for s in selectors if ".atman-explanation" not in s and not s.strip().startswith("@")]

    def test_written_and_returned_pages_are_the_same(self, tmp_path):
        assert sky().to_html(tmp_path / "page.html") == (tmp_path / "page.html").read_text(encoding="utf-8")

    def test_no_effect_at_all(self):
        page = Page(explain("ab", spanning("ab", "ab"), [[0.0]]).to_html())
        assert page.spans()[0]["style"] == "--strength:0.0%"


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
class TestScript:
    def loaded(self, html: str, folder: Path) -> str:
        """The page's elements after its scripts have run."""
        page = folder / "page.html"
        page.write_text(html, encoding="utf-8")
        command = [
            "chromium",
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=2000",
        ]
        command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    def test_the_policy_lets_the_script_of_the_page_run(self, tmp_path):
        html = sky().to_html()
        assert "data-live=" not in html
        assert 'data-live=""' in self.loaded(html, tmp_path)

    def test_selection_belongs_to_one_copy(self, tmp_path):
        act = """
          const [first, second] = document.querySelectorAll(".atman-explanation");
          document.body.dataset.told = "";
          const tell = (text) => (document.body.dataset.told += `${text}|`);
          const press = (key) =>
            document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
          second.querySelector('[data-token="-1"]').focus();
          press("ArrowRight");
          tell(document.activeElement.dataset.token + document.activeElement.getAttribute("aria-checked"));
          for (const span of document.querySelectorAll(".unit"))
            tell(span.style.getPropertyValue("--strength") + (span.matches(".negative") ? "-" : "+"));
          tell([...second.querySelectorAll("[data-unit]")].map((row) => row.dataset.unit).join(" "));
          second.querySelector('[data-unit="3"]').click();
          tell(second.querySelector(".tip").innerText.split("\\n").slice(0, 2).join(" "));
          press("Escape");
          tell(second.querySelector(".tip").hidden);
          press("Home");
          tell(document.activeElement.textContent);
        """
        html = f"<!doctype html><meta charset=utf-8><body>{sky()._repr_html_() * 2}<script>{act}</script>"
        told = self.loaded(html, tmp_path).partition('data-told="')[2].partition('"')[0].split("|")
        assert told == [
            "0true",
            *("2.5%+", "25.0%+", "100.0%+", "50.0%-"),  # the first copy still shows the whole answer
            *("5.0%+", "100.0%+", "25.0%+", "12.5%-"),
            "1 2 0 3",
            "not grey −0.25: without it the token is 28 % more likely",
            "true",
            "The",
            "",
        ]


class TestTerminal:
    def printed(self, explanation: Explanation, encoding: str = "utf-8", top: int = 8, **options: Any) -> str:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        print_explanation(explanation, Console(file=stream, width=100, **options), top)
        stream.flush()
        return stream.buffer.getvalue().decode(encoding)

    def test_piped_output_has_no_colours_and_tells_all(self):
        text = self.printed(sky())
        assert "\x1b" not in text
        assert "[3:The] [2:sky] was [1:clear], [4:not grey]." in text
        lines = [line.split() for line in text.splitlines()]
        assert ["1", "clear", "+4.00", "█" * 24] in lines
        assert ["2", "sky", "+1.00", "█" * 6] in lines
        assert ["4", "not", "grey", "−2.00", "░" * 12] in lines
        assert "log p −1.00, 37 %" in text
        assert "t0 −0.50   t1 −0.50" in text

    def test_no_color_is_obeyed_on_a_terminal(self, monkeypatch):
        monkeypatch.setenv("NO_COLOR", "1")
        text = self.printed(sky(), force_terminal=True, color_system="truecolor")
        assert "48;" not in text
        assert "38;" not in text
        assert "[1:clear]" in text

    def test_colours(self):
        text = self.printed(sky(), force_terminal=True, color_system="truecolor")
        assert "48;2;" in text
        assert "[1:" not in text

    def test_256_colours(self):
        # In a process of its own: rich keeps the codes of the first colour system it writes a style for.
        code = "import test_render; test_render.print_explanation(test_render.sky())"
        environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": ""}
        environment.pop("NO_COLOR", None)
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        command = [sys.executable, "-c", code]
        text = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        assert b"48;5;" in text
        assert b"48;2;" not in text
        assert b"[1:" not in text

    def test_sixteen_colours_are_too_few_for_a_heatmap(self):
        text = self.printed(sky(), force_terminal=True, color_system="standard")
        assert "[1:clear]" in text

    @pytest.mark.parametrize(
        ("ground", "strongest", "ink"),
        [("15;0", (174, 87, 31), "255;255;255"), ("0;15", (242, 121, 43), "0;0;0")],
    )
    def test_strength_is_mixed_into_the_background(self, monkeypatch, ground, strongest, ink):
        monkeypatch.setenv("COLORFGBG", ground)
        text = self.printed(sky(), force_terminal=True, color_system="truecolor")
        red, green, blue = strongest
        assert f"\x1b[38;2;{ink};48;2;{red};{green};{blue}m clear" in text

    @pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "truecolor"}])
    def test_a_prompt_cannot_drive_the_terminal(self, options):
        units = (Unit("\x1b]0;", 0, 0, (0,)), *spanning(HOSTILE, HOSTILE))
        text = self.printed(explain(HOSTILE, units, [[1.0], [2.0]], target_tokens=("\x1b[2J",)), **options)
        assert "\x1b[31m" not in text
        assert "\x1b]0;" not in text
        assert "\x1b[2J" not in text
        assert "\x07" not in text
        assert "␛[31mred␇" in text

    def test_ascii_only(self):
        explanation = explain("naïve 👩‍🚀", spanning("naïve 👩‍🚀", "naïve"), [[-1.0]])
        text = self.printed(explanation, encoding="ascii")
        assert r"[1:na\xefve] \U0001f469" in text
        assert "-1.00  " + "-" * 24 in text

    def test_labels_of_right_to_left_text_stay_in_their_places(self):
        units = spanning("שלום ab \u0301", "שלום", "ab", "\u0301")
        options = {"target_tokens": ("ירושלים",), "target": "ירושלים"}
        explanation = explain("שלום ab \u0301", units, [[3.0], [2.0], [1.0]], **options)
        text = self.printed(explanation)
        assert "[1:\u2068שלום\u2069] [2:ab] [3:◌\u0301]" in text
        assert "  1  \u2068שלום\u2069  " in text
        assert "\u2068ירושלים\u2069 −0.50" in text
        contrast = explain("שלום ab \u0301", units, [[3.0], [2.0], [1.0]], **options, settings={"versus": "\u202eתל"})
        assert "\u2068ירושלים\u2069 rather than \u2068⟨RLO⟩תל\u2069 −0.50" in self.printed(contrast)
        assert not re.search("[\u2068\u2069]|2068|2069", self.printed(contrast, encoding="ascii"))

    def test_rich_markup_in_a_prompt_is_text(self):
        text = self.printed(explain("[bold]x[/bold] [/red] :smile:", (Unit("x", 6, 7, (0,)),), [[1.0]]))
        assert "[bold][1:x][/bold] [/red] :smile:" in text

    def test_newlines_with_a_score_are_shown(self):
        explanation = explain("a\n\nb", spanning("a\n\nb", "\n\n"), [[1.0]])
        assert "a[1:↵↵]\n\nb" in self.printed(explanation)
        coloured = self.printed(explanation, force_terminal=True, color_system="truecolor")
        assert coloured.count("↵") == 4  # two in the text, two in the list

    def test_answer_units_and_units_without_characters(self):
        units = (Unit("<s>", 0, 0, (0,)), Unit("ab", 0, 2, (1,)), Unit("ye", 0, 2, (2,), "target"))
        text = self.printed(explain("ab", units, [[2.0], [0.0], [1.0]]))
        assert "[1:<s>]ab" in text
        assert "[2:ye]s" in text

    def test_top_limits_the_list(self):
        text = self.printed(sky(), top=2)
        assert "[2:sky]" in text
        assert "[3:not grey]" in text
        assert ":The]" not in text

    def test_no_effect_at_all(self):
        assert "no unit changes it" in self.printed(explain("ab", spanning("ab", "ab"), [[0.0]]))

    def test_rich_and_show_print_the_same(self):
        outputs = []
        for show in (lambda console: console.print(sky()), lambda console: sky().show(console=console)):
            stream = io.StringIO()
            show(Console(file=stream, width=80))
            outputs.append(stream.getvalue())
        assert outputs[0] == outputs[1]
        assert "[1:clear]" in outputs[0]
