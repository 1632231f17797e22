"""The page: its files as they are served, and what a reader can do with it in a browser."""

import re
import time
from importlib.resources import files

import pytest
import tiny_image_models
import tiny_models
from browser import CHROMIUM, browser
from PIL import Image
from running_service import Gate, running, until

PAGE = {entry.name: entry.read_text() for entry in files("atman_kernels.serve").joinpath("page").iterdir()}
SCRIPTS = {name: text for name, text in PAGE.items() if name.endswith(".js")}
TOKEN = "a-word-that-nobody-knows"
PROMPT = "w5 w6 w7 <b>w8</b> w9 w10"


@pytest.fixture(scope="module")
def model():
    model = tiny_models.build("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}w3"
    return tokenizer


@pytest.fixture(scope="module")
def service(model, tokenizer):
    with running(model, tokenizer, max_tokens=200, max_new_tokens=20) as found:
        yield found


# Its files ------------------------------------------------------------------------------------------------------------


def test_every_file_is_served(service):
    for name, text in PAGE.items():
        response = service.http.get("/" if name == "index.html" else f"/page/{name}")
        assert (response.status_code, response.text) == (200, text), name
        assert "'unsafe" not in response.headers["content-security-policy"]


def test_what_the_files_ask_for_is_there(service):
    asked = re.findall(r'(?:href|src)="([^"#]+)"', PAGE["index.html"])
    asked += [f"page/{name}" for text in SCRIPTS.values() for name in re.findall(r'from "\./([^"]+)"', text)]
    asked += [name for text in SCRIPTS.values() for name in re.findall(r'src: "([^"]+)"', text)]
    assert len(asked) > 8
    for path in asked:
        assert service.http.get(f"/{path}").status_code == 200, path


def test_nothing_is_inline():
    page = PAGE["index.html"]
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", page)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", page))


@pytest.mark.parametrize("name", sorted(PAGE))
def test_nothing_comes_from_elsewhere(name):
    assert not re.search(r"(?:https?:)?//[\w.]+\.\w", PAGE[name].replace("http://www.w3.org/2000/svg", ""))
    assert "@import" not in PAGE[name]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_text_never_becomes_markup(name):
    markup = r"(?:inner|outer)HTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|setHTML|srcdoc"
    found = re.findall(rf"{markup}|\beval\(|new Function|cssText", SCRIPTS[name])
    # what the service rendered, whose templates escape every text, is parsed in one place
    assert found == (["DOMParser"] if name == "service.js" else [])


def test_every_field_has_a_name():
    page = PAGE["index.html"]
    for tag in re.findall(r"<(?:input|select|textarea)[^>]*>", page):
        name = re.search(r'\bid="([^"]+)"', tag)
        before = page[: page.index(tag)]
        inside = before.rfind("<label") > before.rfind("</label>")
        assert inside or (name and f'for="{name[1]}"' in page), tag


def test_what_the_scripts_look_for_is_on_the_page():
    ids = set(re.findall(r'\bid="([^"]+)"', PAGE["index.html"]))
    looked = {name for text in SCRIPTS.values() for name in re.findall(r'\bat\("([^"]+)"\)', text)}
    assert looked > {"prompt", "words"}
    assert looked <= ids


# In a browser ---------------------------------------------------------------------------------------------------------

DONE = "document.querySelector('#status').textContent.startsWith('Done')"
READY = "document.querySelector('#units').options.length > 0"
ALIVE = "document.querySelector('#heatmap .atman-explanation[data-live] .ranking li') !== null"
KNOWN = "document.querySelectorAll('#heatmap .unit:not(.waiting)').length"
STEERED = "document.querySelector('#after').textContent !== '—' && !document.querySelector('#after').ariaBusy"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture
def page():
    pytest.importorskip("websockets")
    with browser() as page:
        page.look(1280, 900)
        yield page
        assert page.complaints == []
        assert all(re.match(r"http://127\.0\.0\.1:|data:|blob:|about:", url) for url in page.requested)


def ask(page, url, prompt=PROMPT):
    page.go(f"{url}/")
    page.until(READY)
    page.type("#prompt", prompt)
    page.click("#go")


@pytest.mark.slow
@in_browser
def test_type_explain_choose_a_token_steer_and_come_back(service, page):
    ask(page, service.url)
    page.until(f"{DONE} && {ALIVE}")
    assert page.text("#heatmap .texts .text") == PROMPT
    assert page.run("document.querySelector('.texts b:not([data-end])') === null")  # what looks like markup is text
    expected = service.explain(prompt=PROMPT, units="word", max_new_tokens=20).json()
    totals = {unit["text"]: sum(row) for unit, row in zip(expected["units"], expected["scores"], strict=True)}
    assert page.text("#heatmap .ranking li bdi") == max(totals, key=totals.get)
    page.click("#heatmap [data-token='1']")
    page.until("document.querySelector('#heatmap [data-token=\"1\"]').ariaChecked === 'true'")

    assert page.text("#before") == expected["target"].removesuffix("\n")
    page.click("#words button:nth-of-type(2)")  # down
    page.click("#words button:nth-of-type(3)")
    page.click("#words button:nth-of-type(3)")  # up
    assert (
        page.run("[...document.querySelectorAll('#words button')].map(b => b.dataset.turned).join()") == ",down,up,,,"
    )
    page.until(STEERED)
    spans = [{"start": 3, "end": 5, "factor": 0.0}, {"start": 6, "end": 8, "factor": 4.0}]
    answer = {"prompt": PROMPT, "spans": spans, "max_new_tokens": 20}
    steered = service.http.post("/v1/answers", json=answer).json()["answer"]
    assert page.text("#after") == steered != expected["target"]

    page.go(f"{service.url}/?again")  # the history outlives the page
    page.until(READY)
    page.click("#entries button")
    page.until(ALIVE)
    assert page.run("document.querySelector('#prompt').value") == PROMPT


@pytest.mark.slow
@in_browser
def test_it_fills_while_the_model_works_and_can_be_stopped(model, tokenizer, page):
    prompt = " ".join(f"w{5 + number % 90}" for number in range(100))
    with running(model, tokenizer) as service:
        gate = Gate(model)
        try:
            page.go(f"{service.url}/")
            page.until(READY)
            page.type("#prompt", prompt)
            with gate.shut():
                page.press("Enter", modifiers=2)
                page.until("document.activeElement.id === 'cancel' || !document.querySelector('#cancel').hidden")
                assert page.run("document.querySelector('#go').disabled")
                until(service.busy)
                page.click("#cancel")
                page.until("document.querySelector('#status').textContent === 'Stopped.'")
            until(lambda: not service.known())
            assert not page.shown("#outcome")

            page.type("#most", "4")
            slow = model.get_decoder().register_forward_pre_hook(lambda *_: time.sleep(0.25))
            page.click("#go")
            page.until("document.querySelector('#answering').textContent")
            first = page.text("#answering")
            page.until(f"0 < {KNOWN} && {KNOWN} < 100")
            assert not page.run(DONE)
            slow.remove()
            page.until(f"{DONE} && {ALIVE}")
            answer = service.explain(prompt=prompt, units="word", max_new_tokens=4).json()["target"]
            assert answer.startswith(first)  # token by token
            assert answer != first
        finally:
            gate.remove()


@pytest.mark.slow
@in_browser
def test_a_contrast_the_direct_effect_a_link_and_a_chat(service, page):
    page.go(f"{service.url}/")
    page.until(READY)
    page.click("#examples button:nth-of-type(3)")
    assert page.run("document.querySelector('#versus').value") == "Sydney"
    page.type("#prompt", "w5 w6 w7")
    page.type("#target", "w8")
    page.type("#versus", "w9")
    page.click("#store")
    page.click("#go")
    page.until(f"{DONE} && {ALIVE}")
    assert "w8 rather than w9" in page.text("#heatmap .answer")
    link = page.run("document.querySelector('#link').href")
    kept = service.http.get(f"/v1/explanations/{link.partition('#')[2]}").json()
    assert (kept["target"], kept["versus"]) == (" w8", " w9")

    page.type("#versus", "")
    page.run("document.querySelector('#depth').value = 'direct'")
    page.click("#go")
    page.until("document.querySelector('#heatmap').textContent.includes('(direct effect)')")

    page.go("about:blank")
    page.go(link)
    page.until(ALIVE)
    assert "rather than" in page.text("#heatmap .answer")
    assert not page.shown("#steer")

    page.type("#prompt", "w5 w6 w7")
    page.click("#forms input[value=chat]")
    page.click("input[name=answer][value=own]")
    page.click("#go")
    page.until(f"{DONE} && {ALIVE}")
    assert page.text("#heatmap .texts .text").startswith("user")


@pytest.mark.slow
@in_browser
def test_a_picture_is_explained_where_the_model_sees(page, tmp_path):
    side = tiny_image_models.SIDE
    Image.new("RGB", (side, side), "red").save(tmp_path / "red.png")
    model, processor = tiny_image_models.build("llava"), tiny_image_models.processor("llava")
    with running(model, processor, max_new_tokens=8) as service:
        page.go(f"{service.url}/")
        page.until(READY)
        assert page.shown("#images")
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        field = page.call("DOM.querySelector", nodeId=root, selector="#images")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "red.png")])
        page.until("document.querySelector('#pictures img') !== null")
        page.type("#prompt", "<image> w5 w6")
        page.click("input[name=answer][value=given]")
        page.type("#target", "w8")
        page.click("#go")
        page.until(f"{DONE} && {ALIVE}")
        box = "document.querySelector('#heatmap .image').getBoundingClientRect()"
        last = "[...document.querySelectorAll('#heatmap .image .unit')].at(-1).getBoundingClientRect()"
        assert page.run(f"Math.abs({box}.right - {last}.right) + Math.abs({box}.bottom - {last}.bottom)") < 2
        assert page.run("document.querySelector('#heatmap .image img').naturalWidth") == side
        assert not page.shown("#steer")


@pytest.mark.slow
@in_browser
def test_the_strongest_are_estimated_first(service, page):
    page.go(f"{service.url}/")
    page.until(READY)
    page.type("#prompt", " ".join(f"w{5 + number % 90}" for number in range(100)))
    page.type("#most", "3")
    page.run("document.querySelector('#depth').value = 'strongest'")
    page.run(
        "new MutationObserver(() => { if (document.querySelectorAll('[aria-label*=\"not complete\"] .estimate').length)"
        " window.estimated = true; }).observe(document.querySelector('#heatmap'),"
        " {subtree: true, attributes: true, childList: true})"
    )
    page.click("#go")
    page.until(f"{DONE} && {ALIVE}")
    assert page.run("window.estimated")
    assert page.text("#heatmap .legend + .quiet").endswith("found the strongest.")


@pytest.mark.slow
@in_browser
def test_nested_units_open_and_two_answers_stand_side_by_side(service, page):
    page.go(f"{service.url}/")
    page.until(READY)
    page.type("#prompt", "w5 w6 w7\n\nw8 w9 w10\n\nw11 w12")
    page.run("document.querySelector('#units').value = 'paragraph word'")
    page.run("document.querySelector('#explain').dispatchEvent(new Event('change'))")
    assert page.run("document.querySelector('#depth [value=strongest]').disabled")
    page.click("input[name=answer][value=given]")
    page.type("#target", "w20")
    page.type("#versus", "w30")
    page.click("#go")
    page.until(f"{DONE} && {ALIVE}")
    assert page.run("document.querySelectorAll('#heatmap .texts .band').length") == 3
    assert page.run("document.querySelectorAll('#heatmap .texts .band.open .unit').length") == 8
    lefts = "[...document.querySelectorAll('#heatmap .side')].map(e => Math.round(e.getBoundingClientRect().left))"
    first, second = page.run(lefts)
    assert first < second
    kept = service.explain(
        prompt="w5 w6 w7\n\nw8 w9 w10\n\nw11 w12", target=" w20", versus=" w30", units=["paragraph", "word"]
    ).json()
    strengths = (
        "[...document.querySelectorAll('#heatmap [data-side=\"1\"] .band')]"
        ".map(e => parseFloat(e.style.getPropertyValue('--strength')))"
    )
    sides = [both for both, unit in zip(kept["sides"], kept["units"], strict=True) if "parent" not in unit]
    most = max(abs(total) for both in sides for total in both)
    assert page.run(strengths) == pytest.approx([100 * abs(both[1]) / most for both in sides], abs=0.1)
    page.look(390, 800)
    first, second = page.run(lefts)
    assert first == second  # one below the other
    assert page.run("document.documentElement.scrollWidth") <= 390
    page.go(f"{service.url}/?again")
    page.until(READY)
    page.click("#entries button")
    page.until(ALIVE)
    assert page.run("document.querySelector('#units').value") == "paragraph word"


@pytest.mark.slow
@in_browser
def test_the_token_is_asked_for_and_stays_in_the_tab(model, tokenizer, page):
    with running(model, tokenizer, token=TOKEN) as service:
        page.go(f"{service.url}/")
        page.until("document.activeElement.id === 'token'")
        page.type("#token", "wrong")
        page.press("Enter")
        page.until("!document.querySelector('#fault').hidden")
        page.type("#token", TOKEN)
        page.press("Enter")
        page.until(READY)
        assert not page.shown("#unlock")
        assert page.run("JSON.stringify(localStorage)").find(TOKEN) < 0
    page.complaints = [text for text in page.complaints if "401" not in text]


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(service, page, width):
    page.look(width, 800)
    ask(page, service.url, f"{PROMPT} {'w' * 200}")
    page.until(f"{DONE} && {ALIVE}")
    assert page.run("document.documentElement.scrollWidth") <= width
