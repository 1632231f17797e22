"""Explained images on the way out: overlays, the HTML page, JSON."""

import base64
import html.parser
import io
import json
import sys

import pytest
import tiny_image_models as tiny
import torch
from PIL import Image

import atman_kernels as ak
from atman_kernels.planning.image_units import patch_units, query_units
from atman_kernels.planning.units import Unit
from atman_kernels.result import NEGATIVE, POSITIVE


def colour(hue):
    return tuple(bytes.fromhex(hue[1:]))


@pytest.fixture
def explanation():
    """A picture of 40 × 20 in 2 × 2 patches; two answer tokens; text and placeholder before."""
    units = (Unit("see", 0, 3, (0,)), *patch_units(2, 2, (40, 20), first_position=1, characters=(4, 11)))
    scores = torch.tensor([[0.5, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    return ak.Explanation(
        "see <image>", " a cat", units, scores, (" a", " cat"), torch.tensor([-0.1, -0.2]),
        {"images": [{"width": 40, "height": 20}]}, {},
    )  # fmt: skip


@pytest.fixture
def grey():
    return Image.new("RGB", (40, 20), (100, 100, 100))


def blend(hue, share, ground=100):
    return tuple(round(ground + share * (part - ground)) for part in colour(hue))


def test_colours_lie_where_the_patches_are(explanation, grey):
    drawn = explanation.overlay(grey, opacity=1.0, target_token=0)
    assert drawn.size == (40, 20)
    assert drawn.getpixel((0, 0)) == drawn.getpixel((19, 9)) == colour(POSITIVE)
    assert drawn.getpixel((20, 0)) == drawn.getpixel((39, 9)) == blend(NEGATIVE, 0.5)
    assert drawn.getpixel((0, 10)) == drawn.getpixel((39, 19)) == (100, 100, 100)


def test_the_whole_answer_by_default_and_less_than_opaque(explanation, grey):
    drawn = explanation.overlay(grey)
    assert drawn.getpixel((5, 15)) == blend(POSITIVE, 0.7), "total 4 is the largest"
    assert drawn.getpixel((5, 5)) == blend(POSITIVE, 0.35)
    assert drawn.getpixel((25, 5)) == blend(NEGATIVE, 0.175)


def test_colours_of_the_picture_are_not_taken_for_scores(explanation):
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    assert len(set(explanation.overlay(picture).getpixel((30, 15)))) == 1


def test_resolution_is_the_pictures_own(explanation):
    drawn = explanation.overlay(Image.new("RGB", (400, 200), (100, 100, 100)), opacity=1.0, target_token=0)
    assert drawn.size == (400, 200)
    assert drawn.getpixel((199, 99)) == colour(POSITIVE)
    assert drawn.getpixel((200, 99)) == blend(NEGATIVE, 0.5)


def test_targets_side_by_side_on_one_scale(explanation, grey):
    drawn = explanation.overlay(grey, opacity=1.0, target_token=[0, 1])
    top = drawn.height - 20
    assert top > 0, "captions stand above"
    second = drawn.width - 40
    assert drawn.getpixel((5, top + 5)) == blend(POSITIVE, 0.5)
    assert drawn.getpixel((second + 5, top + 15)) == colour(POSITIVE)
    assert drawn.getpixel((second + 25, top + 5)) == (100, 100, 100)
    assert len(drawn.crop((0, 0, 40, top)).getcolors()) > 1, "something is written there"


def test_scores_of_units_that_overlap_add_up(explanation, grey):
    whole = patch_units(1, 1, (40, 20), first_position=5)
    both = ak.Explanation(
        explanation.prompt, explanation.target, (*explanation.units, *whole),
        torch.cat([explanation.scores, torch.tensor([[-2.0, 0.0]])]), explanation.target_tokens,
        explanation.base_logprobs, explanation.settings, {},
    )  # fmt: skip
    drawn = both.overlay(grey, opacity=1.0, target_token=0)
    assert drawn.getpixel((5, 5)) == (100, 100, 100), "2 - 2"
    assert drawn.getpixel((25, 5)) == colour(NEGATIVE), "-1 - 2 is the largest"


def test_written_as_png(explanation, grey, tmp_path):
    drawn = explanation.overlay(grey, tmp_path / "over.png")
    with Image.open(tmp_path / "over.png") as read:
        assert read.format == "PNG"
        assert read.tobytes() == drawn.tobytes()
    with pytest.raises(ak.InputError, match="path must be a file in an existing folder"):
        explanation.overlay(grey, tmp_path / "no" / "over.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "cat.png"}, "image must be a PIL image, got str"),
        ({"image": Image.new("RGB", (20, 40))}, "image is 20 × 40 pixels, but image 0 of the explanation was 40 × 20"),
        ({"index": 1}, "image 1 has no unit with a place in it"),
        ({"target_token": 2}, r"target_token must be indices in \[0, 2\), got 2"),
        ({"target_token": []}, r"target_token must be indices in \[0, 2\), got \[\]"),
        ({"opacity": 0}, r"opacity must be in \(0, 1\], got 0"),
    ],
)
def test_bad_overlays(explanation, grey, arguments, message):
    with pytest.raises(ak.InputError, match=message):
        explanation.overlay(**{"image": grey} | arguments)


def test_image_tokens_without_a_place_cannot_be_drawn(explanation, grey):
    units = query_units(2, first_position=1)
    placeless = ak.Explanation("x", "y", units, torch.ones(2, 1), ("y",), torch.zeros(1), {}, {})
    with pytest.raises(ak.InputError, match="image 0 has no unit with a place in it"):
        placeless.overlay(grey)
    assert "query 2" in placeless.to_html()


def test_without_pillow_the_error_names_the_extra(explanation, grey, monkeypatch):
    for name in [name for name in sys.modules if name == "PIL" or name.startswith("PIL.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "atman_kernels.result.overlay", raising=False)
    with pytest.raises(ImportError, match=r"pictures need pillow: pip install atman-kernels\[images\]"):
        explanation.overlay(grey)
    assert "row 2, column 1" in explanation.to_html(), "the page without pixels needs no pillow"


# --- the page ---


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_page_has_every_patch_at_its_place_and_the_picture_inside(explanation, tmp_path):
    picture = tiny.picture(40, 20)
    text = explanation.to_html(tmp_path / "page.html", images=picture)
    page = Page(text)
    (image,) = page.of("img")
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as embedded:
        assert embedded.tobytes() == picture.tobytes()
    places = {a["data-units"]: a["style"] for a in page.of("span") if "left:" in a.get("style", "")}
    assert sorted(places) == ["1", "2", "3", "4"]
    assert "--strength:25.0%;left:50.000%;top:0.000%;width:50.000%;height:50.000%" in places["2"]
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "http" not in text.replace("http-equiv", "")


def test_page_without_the_picture_still_has_the_patches(explanation):
    page = Page(explanation.to_html())
    assert not page.of("img")
    assert sum("left:" in a.get("style", "") for a in page.of("span")) == 4
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "img-src" not in policy


def test_large_pictures_are_embedded_smaller(explanation):
    page = explanation.to_html(images=Image.new("RGB", (4000, 2000)))
    (image,) = Page(page).of("img")
    with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as embedded:
        assert embedded.size == (1024, 512)


def test_names_of_units_are_escaped(grey):
    unit = Unit("<script>alert(1)</script>", 0, 0, (0,), "image", (0, 0, 40, 20))
    text = ak.Explanation("x", "y", (unit,), torch.ones(1, 1), ("y",), torch.zeros(1), {}, {}).to_html(images=grey)
    assert "<script>alert" not in text


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images has 0, but the explanation has units of 1 images"),
        ([Image.new("RGB", (40, 20))] * 2, "images has 2, but"),
        (Image.new("RGB", (20, 40)), "image is 20 × 40 pixels"),
        ("cat.png", "image must be a PIL image, got str"),
    ],
)
def test_bad_pictures_for_a_page(explanation, images, message):
    with pytest.raises(ak.InputError, match=message):
        explanation.to_html(images=images)


# --- JSON ---


def test_boxes_survive_saving(explanation, tmp_path):
    explanation.save(tmp_path / "e.json")
    read = ak.Explanation.load(tmp_path / "e.json")
    assert read.units == explanation.units
    assert read.settings == explanation.settings
    assert "pixel" not in (tmp_path / "e.json").read_text()


def test_files_from_before_there_were_images_are_read(explanation, tmp_path):
    explanation.save(tmp_path / "e.json")
    content = json.loads((tmp_path / "e.json").read_text())
    content["units"] = content["units"][:1]
    content["scores"] = content["scores"][:1]
    for unit in content["units"]:
        del unit["box"], unit["image"]
    (tmp_path / "e.json").write_text(json.dumps(content))
    assert ak.Explanation.load(tmp_path / "e.json").units == explanation.units[:1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("box", [1, 2, 3], r"units\[1\].box must be \(left, top, right, bottom\)"),
        ("box", [5, 0, 5, 9], r"units\[1\].box must be"),
        ("box", "1234", "box must be a list, got str"),
        ("image", -1, r"units\[1\].image must be an integer >= 0, got -1"),
        ("source", "video", r'units\[1\].source must be "prompt", "target" or "image"'),
    ],
)
def test_bad_files(explanation, tmp_path, field, value, message):
    explanation.save(tmp_path / "e.json")
    content = json.loads((tmp_path / "e.json").read_text())
    content["units"][1][field] = value
    (tmp_path / "e.json").write_text(json.dumps(content))
    with pytest.raises(ak.InputError, match=message):
        ak.Explanation.load(tmp_path / "e.json")


def test_settings_of_strangers_do_no_harm(explanation, grey):
    for images in ("x", [1], [{"width": "<blink>", "height": 2}], [{"width": 1, "height": 1}]):
        strange = ak.Explanation(
            explanation.prompt, explanation.target, explanation.units, explanation.scores, explanation.target_tokens,
            explanation.base_logprobs, {"images": images}, {},
        )  # fmt: skip
        assert strange.overlay(grey).size == (40, 20)
        assert "<blink>" not in strange.to_html(images=grey)
