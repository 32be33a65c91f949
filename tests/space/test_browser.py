"""The page as visitors meet it, in a real browser."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

TABS = ("Try it", "Evidence", "Verify", "Score your own")


class Visit:
    """A page with everything that went wrong on it."""

    def __init__(self, browser, url, **options):
        self.troubles = []
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)  # other tests share the cores
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.troubles.append(f"page error: {error}"))
        self.page.on("request", lambda r: None if self._own(r.url, url) else self.troubles.append(f"external {r.url}"))
        self.page.on("requestfailed", self._failed)
        self.page.on("response", lambda r: self.troubles.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.page.goto(url)
        self.page.get_by_role("tab", name="Try it").wait_for()
        # A stroke or a click before its script has run would be lost.
        for widget in ("sketch", "examples-authorized", "examples-unauthorized"):
            self.page.locator(f"#{widget} [data-ready]").wait_for()

    @staticmethod
    def _own(address, url):
        return address.startswith((url, "data:", "blob:"))

    def _console(self, message):
        if message.type == "error":
            self.troubles.append(f"console: {message.text}")

    def _failed(self, request):
        # Gradio ends its event stream by closing the connection.
        if "/queue/data" not in request.url:
            self.troubles.append(f"failed {request.url}: {request.failure}")

    def open(self, tab):
        self.page.get_by_role("tab", name=tab).click()

    def expect(self, selector, text):
        try:
            self.page.locator(selector, has_text=text).wait_for()
        except Exception as error:
            found = self.page.locator(selector).all_inner_texts()
            raise AssertionError(f"{selector} says {found}; needed: {text!r}") from error

    def upload(self, selector, path):
        clear = self.page.locator(f"{selector} button[aria-label='Clear']")
        if clear.count():
            clear.first.click()
        self.page.locator(f"{selector} input[type=file]").set_input_files(path)

    def width(self):
        return self.page.evaluate("document.documentElement.scrollWidth")


@pytest.fixture
def visit(browser, url):
    visits = []

    def start(**options):
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield start
    troubles = [trouble for visit in visits for trouble in visit.troubles]
    for each in visits:
        each.context.close()
    assert not troubles


def draw(visit):
    paper = visit.page.locator("#sketch canvas")
    # Unlike coordinates read once, hover() waits until the paper has stopped moving.
    paper.hover(position={"x": 100, "y": 60})
    visit.page.mouse.down()
    paper.hover(position={"x": 125, "y": 130})
    paper.hover(position={"x": 150, "y": 200})
    visit.page.mouse.up()


def test_draw_and_clear(visit):
    tab = visit()
    draw(tab)
    tab.expect("#message", "Your drawing")
    for model in ("#unprotected", "#protected"):
        assert len(re.findall(r"\d+%", tab.page.locator(model).inner_text())) == 4
    tab.page.locator("#seen img").wait_for()
    tab.page.locator("#sketch button").click()
    tab.expect("#message", "Draw, upload or pick")


def test_examples_by_keyboard(visit):
    tab = visit()
    button = tab.page.locator("#examples-unauthorized button").nth(3)
    assert button.get_attribute("aria-label") == "Not authorized: optdigits, test images: 3"
    button.focus()
    tab.page.keyboard.press("Enter")
    tab.expect("#message", "not authorized), labelled 3")
    tab.page.locator("#examples-authorized button").nth(7).click()
    tab.expect("#message", "(authorized), labelled 7")


def test_upload_an_image(visit, tmp_path):
    tab = visit()
    for name, mode in (("a.png", "RGBA"), ("b.jpg", "L"), ("c.webp", "RGB")):
        Image.fromarray(np.full((40, 30), 90, np.uint8)).convert(mode).save(tmp_path / name)
        tab.upload("#upload", tmp_path / name)
        tab.expect("#message", "Your image")
        draw(tab)
        tab.expect("#message", "Your drawing")


def test_broken_images_give_a_message(visit, tmp_path):
    tab = visit()
    (tmp_path / "text.png").write_text("not an image")
    tab.upload("#upload", tmp_path / "text.png")
    tab.expect("#message", "not an image that can be read")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:900])
    tab.upload("#upload", tmp_path / "cut.png")
    tab.expect("#message", "damaged")


def test_evidence(visit):
    tab = visit()
    tab.open("Evidence")
    tab.expect("#evidence", "protected, all weights tuned")
    text = tab.page.locator("#evidence").inner_text()
    for expected in ("+0.200", "worst case: all weights tuned", "25 %", "50.0% of 4,096", "three times as long"):
        assert expected in text, expected
    assert tab.page.evaluate("document.querySelector('#evidence img').naturalWidth") > 900


def test_verify(visit, tmp_path):
    tab = visit()
    tab.open("Verify")
    tab.expect("#state", "signature was not checked")
    text = tab.page.locator("#record").inner_text()
    for expected in ("Authorized", "mnist", "For digits <b>only</b>", "What is not claimed", "apache-2.0"):
        assert expected in text, expected
    (tmp_path / "key.pem").write_text("no key")
    tab.upload("#key", tmp_path / "key.pem")
    tab.expect("#state .ntp-bad", "needed")


def test_score_typed_curves(visit):
    tab = visit()
    tab.open("Score your own")
    tab.page.locator("#sizes textarea, #sizes input").fill("10 100")
    tab.page.locator("#checkpoint textarea").fill("0.5 0.7")
    tab.page.locator("#scratch textarea").fill("0.3 0.6")
    tab.page.locator("#score").click()
    tab.expect("#scored", "+0.1500")
    tab.page.locator("#scored img").wait_for()
    tab.page.locator("#scratch textarea").fill("30 60")
    tab.page.locator("#score").click()
    tab.expect("#scored .ntp-bad", "Divide percentages by 100")


def test_score_files(visit, tmp_path):
    tab = visit()
    tab.open("Score your own")
    (tmp_path / "a.json").write_text(json.dumps({"sizes": [10, 100], "checkpoint": [0.5, 0.7], "scratch": [0.3, 0.6]}))
    tab.upload("#curves", tmp_path / "a.json")
    tab.expect("#scored", "+0.1500")
    (tmp_path / "b.csv").write_text("size,accuracy\n10,0.5\n")
    tab.upload("#curves", tmp_path / "b.csv")
    tab.expect("#scored .ntp-bad", "has the columns size, accuracy")
    (tmp_path / "c.csv").write_bytes(bytes(range(256)))
    tab.upload("#curves", tmp_path / "c.csv")
    tab.expect("#scored .ntp-bad", "not a text file")


def test_phone(visit):
    tab = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    for name in TABS:
        tab.open(name)
        tab.page.wait_for_timeout(200)
        assert tab.width() <= 390, name
    tab.open("Try it")
    tab.page.locator("#examples-unauthorized button").nth(2).tap()
    tab.expect("#message", "labelled 2")
    box = tab.page.locator("#message").bounding_box()
    assert 0 <= box["y"] <= 844 - box["height"]


def test_dark(visit):
    tab = visit(color_scheme="dark")
    assert tab.page.locator("body.dark").count() == 1
    color, back = (
        tab.page.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in (("h2", "color"), ("body", "backgroundColor"))
    )
    light, dark = (np.mean([int(part) for part in re.findall(r"\d+", value)[:3]]) for value in (color, back))
    assert light > 180 > 60 > dark
    draw(tab)
    tab.expect("#message", "Your drawing")


def test_twenty_visitors_at_once(url, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    Image.fromarray(np.full((28, 28), 120, np.uint8)).save(tmp_path / "a.png")
    clients = [gradio_client.Client(url, verbose=False) for _ in range(4)]

    def ask(number):
        return clients[number % 4].predict(gradio_client.handle_file(tmp_path / "a.png"), api_name="/classify")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert all("Your image" in answer[0] for answer in answers)
    assert len({json.dumps(answer[2:]) for answer in answers}) == 1


def test_requests_that_the_page_never_makes_end_without_a_traceback(url):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(url, verbose=False)
    assert "needed" in client.predict("10 x", "a", "", api_name="/score")
