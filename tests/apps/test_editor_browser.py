"""What a person sees and does, in a real browser."""

import io
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from editor_case import TASKS, Visitor, evaluations, same
from often_case import often
from PIL import Image
from playwright.sync_api import Page, expect

from icd_lightning.apps.editor.engine import examples_of

PICTURE, SOURCE, TARGET = TASKS[0]
MARKUP = "a <img onerror=1 src=x> ${1+1} {{value}}"
expect.set_options(timeout=20_000)


@pytest.fixture
def visit(browser, page) -> Iterator:
    """Open the page in a window of this size and scheme; a request to any other place fails the test."""
    contexts, outside = [], []

    def ask(route) -> None:
        if route.request.url.startswith((page.local_url, "data:", "blob:")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    def opened(width: int = 1280, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(20_000)
        context.route("**/*", ask)
        contexts.append(context)
        tab = context.new_page()
        tab.goto(page.local_url)
        expect(tab.get_by_role("button", name="Edit", exact=True)).to_be_visible()
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert outside == []


def upload(tab: Page, content: Image.Image | bytes, name: str = "picture.png") -> None:
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, "PNG")
        content = buffer.getvalue()
    if (clear := tab.get_by_label("Clear").or_(tab.get_by_label("Remove Image"))).count():
        clear.first.click()
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    tab.locator(".pictures input[type=file]").set_input_files(file)


def ask_for(tab: Page, source: str, target: str) -> None:
    tab.get_by_label("It shows").fill(source)
    tab.get_by_label("It shall show").first.fill(target)
    tab.get_by_role("button", name="Edit", exact=True).click()


def picture(tab: Page, place: str) -> Image.Image:
    """What the page shows there, as it came from the server."""
    address = tab.locator(f".{place} img").first.get_attribute("src")
    return Image.open(io.BytesIO(httpx.get(address).content))


def wait_for_edit(tab: Page, before: str | None) -> None:
    expect(tab.locator(".edit img")).to_have_count(1)
    expect(tab.locator(".edit img")).not_to_have_attribute("src", before or "")


def test_it_opens_with_an_edited_example(visit, pipeline):
    tab, (first, *_) = visit(), examples_of("tiny")
    assert same(picture(tab, "edit"), pipeline.edit(*first).images[0])
    assert same(picture(tab, "reconstruction"), pipeline.reconstruct(first.picture, first.source).images[0])
    expect(tab.locator(".edit .cost").first).to_contain_text(re.compile(r"From noise: 4 evaluations, \d+\.\d\d s"))


def test_a_picture_is_uploaded_and_edited_and_a_slider_only_decodes(visit, pipeline):
    tab = visit()
    upload(tab, PICTURE)
    expect(tab.locator(".edit img")).to_have_count(0)
    ask_for(tab, SOURCE, TARGET)
    wait_for_edit(tab, None)
    assert same(picture(tab, "edit"), pipeline.edit(PICTURE, SOURCE, TARGET).images[0])

    before = tab.locator(".edit img").get_attribute("src")
    slider = tab.get_by_label("range slider for tau").first
    with evaluations() as rows:
        slider.focus()
        box = slider.bounding_box()
        tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        wait_for_edit(tab, before)
    tau = float(slider.input_value())
    assert 0.4 < tau < 0.6
    assert rows == [1] * 4
    assert same(picture(tab, "edit"), pipeline.edit(PICTURE, SOURCE, TARGET, tau=tau).images[0])
    expect(tab.get_by_label("range slider for Swap tau")).to_have_value(str(tau))


@contextmanager
def pipeline_is_busy(page) -> Iterator[None]:
    """For everybody else, as by a long edit of somebody's."""
    begun, done, edit = threading.Event(), threading.Event(), page.editor.edit
    page.editor.edit = lambda *args: begun.set() or (done.wait(20) and edit(*args))
    with ThreadPoolExecutor() as pool:
        visitor = Visitor(page)
        waiting = pool.submit(visitor.edit, PICTURE, SOURCE, TARGET, "swap", 3, 1, 1, 0.3, 0.6, "", "")
        try:
            assert begun.wait(20)
            yield
        finally:
            done.set()
            waiting.result(30)
            page.editor.edit = edit


def test_what_was_made_of_a_picture_goes_with_it_at_once(visit, page):
    tab = visit()
    with pipeline_is_busy(page):
        tab.get_by_label("Clear").or_(tab.get_by_label("Remove Image")).first.click()
        for place in ("edit", "reconstruction"):
            expect(tab.locator(f".{place} img")).to_have_count(0)
            expect(tab.locator(f".{place} .cost").first).to_have_text("")


@pytest.mark.slow
def test_twenty_browsers_at_once_get_their_own_edits(visit, pipeline):
    tabs = [(visit(), task) for task in TASKS[:20]]
    for tab, task in tabs:
        upload(tab, task.picture)
        expect(tab.locator(".edit img")).to_have_count(0)
    for tab, task in tabs:
        ask_for(tab, task.source, task.target)
    for tab, _ in tabs:
        wait_for_edit(tab, None)
    for tab, task in tabs:  # by now the server is done with the pipeline
        assert same(picture(tab, "edit"), pipeline.edit(*task).images[0])


@pytest.mark.slow
def test_an_example_is_edited_by_a_click(visit, pipeline):
    tab, chosen = visit(), examples_of("tiny")[3]
    before = tab.locator(".edit img").get_attribute("src")
    tab.locator(".tiles button.thumbnail-item").nth(3).click()
    wait_for_edit(tab, before)
    expect(tab.get_by_label("It shows")).to_have_value(chosen.source)
    assert same(picture(tab, "edit"), pipeline.edit(*chosen).images[0])


def test_mistakes_are_told_in_plain_words_and_the_next_edit_goes_well(visit):
    tab = visit()
    alert = tab.get_by_role("alert")
    ask_for(tab, SOURCE, MARKUP)
    expect(alert).to_contain_text("this model does not know <img, onerror=1, src=x>, ${1+1}, {{value}}: write with")
    upload(tab, b"no picture", "holiday.png")
    expect(alert).to_contain_text("holiday.png cannot be read as a picture")
    upload(tab, PICTURE)
    expect(alert).to_be_hidden()
    ask_for(tab, SOURCE, TARGET)
    wait_for_edit(tab, None)
    assert "Traceback" not in tab.content()


@pytest.mark.slow
def test_pictures_are_generated(visit):
    tab = visit()
    tab.get_by_role("tab", name="Generate").click()
    tab.get_by_role("button", name="Generate", exact=True).click()
    expect(tab.locator(".large img")).to_have_count(4)


@pytest.mark.slow
def test_borrowed_attention_has_controls_of_its_own_and_a_sheet_is_drawn(visit):
    tab = visit()
    expect(tab.get_by_label("Word weights")).to_be_hidden()
    tab.get_by_label("Borrow attention").click()
    tab.get_by_label("Local blend").fill("none")
    tab.get_by_text("Contact sheet").click()
    tab.get_by_role("button", name="Draw").click()
    expect(tab.get_by_text("8 evaluations each")).to_be_visible()


@pytest.mark.parametrize("width", often([390, 768, 1440], 390))
def test_nothing_is_wider_than_the_window_and_a_notice_is_in_sight(visit, width):
    tab = visit(width)
    tab.get_by_label("Borrow attention").click()
    expect(tab.get_by_label("Word weights")).to_be_visible()
    tab.get_by_text("Contact sheet").click()
    for name in ("Edit", "Generate"):
        tab.get_by_role("tab", name=name).click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.get_by_role("tab", name="Edit").click()
    ask_for(tab, SOURCE, "a cat")
    expect(tab.get_by_role("alert")).to_be_in_viewport()


CONTRAST = """selector => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const element = document.querySelector(selector);
  let behind = element;
  while (channels(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [text, paper] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
    .map(color => light(channels(color)));
  return (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
}"""
READ = ("h1", ".heading p", ".edit .cost .prose", ".prompts button", ".notice p", ".prompts textarea")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_both_schemes(visit, scheme):
    """Contrast as WCAG 2.1 asks for it of text, 4.5."""
    tab = visit(scheme=scheme)
    ask_for(tab, SOURCE, "a cat")
    expect(tab.get_by_role("alert")).to_be_visible()
    for selector in READ:
        assert tab.evaluate(CONTRAST, selector) >= 4.5, selector
