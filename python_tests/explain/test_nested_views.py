"""How nested and named units, and either answer of a contrast, are shown: HTML with and without script, terminal."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from browser import CHROMIUM, browser
from rich.console import Console

from atman_kernels.planning.units import Unit
from atman_kernels.result.data import AnswerLogprobs
from atman_kernels.result.explanation import Explanation
from atman_kernels.result.html import bare_fragment, unfinished
from atman_kernels.result.segments import nested_segments, outlined
from atman_kernels.result.terminal import print_explanation

PROMPT = "sun <b>up\n\nrain\n\nQ?"
UNITS = (
    Unit("sun <b>up", 0, 9, (0, 1), name="Doc <A> & co"),
    Unit("rain", 11, 15, (2,), name="Doc B"),
    Unit("sun", 0, 3, (0,), parent=0),
    Unit("<b>up", 4, 9, (1,), parent=0),
)
SCORES = torch.tensor([[6.0, 2.0], [-3.0, 1.0], [0.5, 0.5], [-2.0, 0.0]])


def made(**fields):
    values = {
        "prompt": PROMPT,
        "target": "ab",
        "units": UNITS,
        "scores": SCORES,
        "target_tokens": ("a", "b"),
        "base_logprobs": torch.tensor([-1.0, -2.0]),
        "settings": {"units": ["span", "word"]},
        "stats": {},
        "levels": ("span", "word"),
    }
    return Explanation(**values | fields)


def contrast():
    """Two documents, of which one speaks for either answer."""
    return made(
        units=UNITS[:2],
        levels=(),
        settings={},
        scores=torch.tensor([[8.0], [-4.0]]),
        target_tokens=("ab rather than c",),
        base_logprobs=torch.tensor([1.5]),
        versus="c",
        logprobs=AnswerLogprobs(-0.5, -2.0),
        sides=torch.tensor([[9.0, 1.0], [-1.0, 3.0]]),
    )


class Spans(HTMLParser):
    """Every painted unit: its number, classes, strength, and the numbers of those around it."""

    def __init__(self, html):
        super().__init__()
        self.found, self.texts, self._open = [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "span":
            values = dict(attrs)
            unit = values.get("data-units")
            if unit is not None:
                style = values.get("style") or values.get("data-style") or ""
                strength = re.search(r"--strength: ?([\d.]+)%", style)
                around = [number for number in self._open if number is not None]
                self.found.append((unit, set(values["class"].split()) - {"unit"}, float(strength[1]), around))
            self._open.append(unit)

    def handle_endtag(self, tag):
        if tag == "span":
            self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] is not None:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + data


EXPECTED = [
    ("0", {"open", "band"}, 100.0, []),
    ("2", set(), 50.0, ["0"]),
    ("3", {"negative"}, 100.0, ["0"]),
    ("1", {"band", "negative"}, 25.0, []),
]


def test_html_without_its_script_shows_bands_with_names_and_what_is_inside():
    html = made().to_html()
    spans = Spans(html)
    assert spans.found == EXPECTED  # each level on its own scale
    assert (spans.texts["2"], spans.texts["3"], spans.texts["1"]) == ("sun", "<b>up", "rain")
    assert '<span class="name">Doc &lt;A&gt; &amp; co</span>' in html
    assert "<b>up" not in html.partition('type="application/json"')[0]
    body = html.partition('aria-label="Prompt')[2].partition("</div>")[0]
    assert body.rstrip().endswith("Q?")  # what no unit covers stays
    assert 'span</bdi> <b data-scale="0">±8.00</b>' in html
    assert "2 span, 2 word units" in html


def test_the_ranking_puts_units_below_what_they_lie_in():
    html = made().to_html()
    rows = re.findall(r'class="depth-(\d)" data-unit="(\d)"', html)
    assert rows == [("0", "0"), ("1", "2"), ("0", "1"), ("0", "0"), ("1", "3")]


def test_outlines_hold_the_strongest_of_each_level_and_their_parents():
    units = [Unit("a", 0, 1, (0,)), Unit("b", 1, 2, (1, 2)), *(Unit("c", 1, 2, (n,), parent=1) for n in (1, 2))]
    assert outlined([3.0, 0.0, 5.0, -1.0], units, (0, 0, 1, 1), 4) == ([0, 1, 2], [1, 3])
    assert outlined([3.0, -9.0], units[:2], (0, 0), 4) == ([0], [1])


def test_pieces_of_overlapping_units_are_not_lost():
    """A file may hold units that no explanation has; they are shown somehow."""
    units = [Unit("abc", 0, 3, (0,)), Unit("cd", 2, 4, (1,)), Unit("abc", 0, 3, (0,), parent=0)]
    found = nested_segments("abcd", units, [[2], [], []])
    assert "".join(piece.text for piece in found) == "abcd"


def test_either_answer_of_a_contrast_is_shown_by_itself():
    html = contrast().to_html()
    first, second = re.findall(r'data-side="\d">(.*?)</div>\s*</div>', html, re.DOTALL)
    assert [span[:3] for span in Spans(first).found] == [("0", set(), 100.0), ("1", {"negative"}, 11.1)]
    assert [span[:3] for span in Spans(second).found] == [("0", set(), 11.1), ("1", set(), 33.3)]
    assert "ab" in first
    assert "log p −2.00" in second
    assert "either answer" not in made().to_html().lower()


def test_files_keep_either_answer(tmp_path):
    contrast().save(tmp_path / "contrast.json")
    assert torch.equal(Explanation.load(tmp_path / "contrast.json").sides, contrast().sides)
    content = json.loads(contrast().to_json())
    assert content["version"] == 2
    del content["sides"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert Explanation.load(tmp_path / "old.json").sides is None


@pytest.mark.parametrize("explanation", [made(), contrast()], ids=["nested", "contrast"])
def test_a_bare_fragment_has_nothing_that_a_strict_policy_forbids(explanation):
    html = bare_fragment(explanation)
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:|<img", html)
    assert re.findall(r"<script[^>]*>", html) == ['<script type="application/json">']
    assert Spans(html).found == Spans(explanation.to_html()).found


def test_a_question_is_shown_before_its_scores():
    html = unfinished(PROMPT, "a<b>", UNITS, ("span", "word"))
    assert [(unit, around) for unit, _, _, around in Spans(html).found] == [
        ("0", []),
        ("2", ["0"]),
        ("3", ["0"]),
        ("1", []),
    ]
    assert "a&lt;b&gt;" in html
    assert not re.search(r"<style|\sstyle=|<script", html)


def printed(explanation, **options):
    stream = io.StringIO()
    print_explanation(explanation, Console(file=stream, width=100, **options))
    return stream.getvalue()


def test_terminals_without_colours_nest_brackets():
    told = printed(made())
    assert "Doc <A> & co +8.00 ▸ [1:[2:sun] [3:<b>up]]" in told
    assert "Doc B −2.00 ▸ [4:rain]" in told
    lines = [line[5:].rstrip() for line in told.splitlines() if re.match(r" +\d+  ", line)]
    assert [re.split(r" {3,}", line)[0] for line in lines] == ["Doc <A> & co", "  sun", "  <b>up", "Doc B"]
    assert [len(re.findall("[█░]", line)) for line in lines] == [24, 12, 24, 6]  # of the largest of their level


def test_terminals_with_colours_underline_what_is_cut():
    told = printed(made(), force_terminal=True, color_system="truecolor")
    assert "Doc B −2.00 ▸" in told
    assert re.search(r"\x1b\[4;[\d;]*m<b>up", told)
    assert not re.search(r"\x1b\[4;[\d;]*mrain", told)


# In a browser ---------------------------------------------------------------------------------------------------------

SHOWN = (
    "[...document.querySelectorAll('[data-units]')].map(s => [s.dataset.units, s.className, "
    "s.style.getPropertyValue('--strength')].join()).join(' | ')"
)
ROWS = "[...document.querySelectorAll('[data-unit]')].map(r => r.className + r.textContent).join(' | ')"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_script_shows_what_was_rendered_and_follows_the_choice_of_a_token(tmp_path):
    pytest.importorskip("websockets")
    with browser() as page:
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        for name, explanation in (("nested", made()), ("contrast", contrast())):
            path = tmp_path / f"{name}.html"
            explanation.to_html(path)
            page.call("Emulation.setScriptExecutionDisabled", value=True)
            page.go(path.as_uri())
            still = page.run(SHOWN), page.run(ROWS)
            page.call("Emulation.setScriptExecutionDisabled", value=False)
            page.go(path.as_uri())
            page.until("document.querySelector('[data-live]') !== null")
            assert (page.run(SHOWN), page.run(ROWS)) == still
            if name == "contrast":
                page.run('document.querySelector(\'[data-side="1"] [data-units="1"]\').focus()')
                assert "ab−1.00c+3.00" in page.text(".tip").replace(" ", "")
        assert page.complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_keys_go_through_a_tree_and_the_tip_says_what_is_around(tmp_path):
    pytest.importorskip("websockets")
    made().to_html(tmp_path / "nested.html")
    with browser() as page:
        page.go((tmp_path / "nested.html").as_uri())
        page.until("document.querySelector('[data-live]') !== null")
        page.run("document.querySelector('[data-units]').focus()")
        visited = []
        for _ in range(4):
            visited.append(page.run("document.activeElement.dataset.units"))
            page.press("ArrowRight")
        assert visited == ["0", "2", "3", "1"]
        page.run("document.querySelector('[data-units=\"3\"]').focus()")
        assert "in Doc <A> & co +8.00" in page.text(".tip")
        page.click("[data-token='1']")  # of the second token, where "sun" is the largest of its level
        found = dict(part.split(",")[::2] for part in page.run(SHOWN).split(" | "))
        assert found == {"0": "100.0%", "2": "100.0%", "3": "0.0%", "1": "50.0%"}
        assert page.text("[data-scale='1']") == "±0.50"
        assert page.complaints == []
