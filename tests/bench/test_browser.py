"""The page in headless Chromium: silent, offline, legible, no scrolling sideways; for keyboard and screen reader."""

import shutil
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from kdedge_bench import report
from kdedge_bench.facts import Facts

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        yield started
        started.close()


def noise(_: Facts, ids: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
    return [np.random.default_rng(index).integers(0, 255, (96, 96, 3), np.uint8) for index in range(len(ids))]


@pytest.fixture(scope="module")
def pages(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A usual page, and one of several runs with everything long and many."""
    from .conftest import build

    usual, folder = run_folder, tmp_path_factory.mktemp("pages")
    names = [
        f"number{index}of_the_very_long_names_without_a_single_space_that_a_flower_may_have" for index in range(60)
    ]
    long_name = "a-run-with-a-name-that-is-longer-than-anybody-should-make-it-but-somebody-will-2500-s17"
    ids = [f"x/{index}.jpg" for index in range(600)]
    many = build(folder / long_name, classes=names, labels=np.arange(600) % 60, ids=ids,
                 right={"baseline": 200, "teacher": 550, "student": 500, "fp32": 500, "int8": 490})  # fmt: skip
    again = build(folder / "again", right={"int8": 380})
    return [
        report([usual], folder / "one.html", load=noise),
        report([many, usual, again], folder / "all.html", load=noise),
    ]


@pytest.mark.parametrize("width", [1280, 400])
def test_page(browser: "Browser", pages: list[Path], width: int) -> None:
    for path in pages:
        page = browser.new_page(viewport={"width": width, "height": 900})
        messages: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message, seen=messages: seen.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error, seen=messages: seen.append(str(error)))
        page.on("request", lambda request, seen=requests: seen.append(request.url))
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert messages == []
        assert requests[0] == path.as_uri()
        assert all(url.startswith(("data:", "file:")) for url in requests)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.body.scrollWidth") <= width
        _check_figures(page, width)
        broken = page.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length")
        assert broken == 0
        # What is wider than the page scrolls in its own box, which the keyboard can reach.
        boxes = page.evaluate("[...document.querySelectorAll('.scroll')].map(box => [box.clientWidth, box.tabIndex])")
        assert boxes
        assert all(wide <= width and index == 0 for wide, index in boxes)
        page.close()


def _check_figures(page: object, width: int) -> None:
    """Every label is at least 9 CSS px high, and lies within its figure."""
    labels = page.evaluate("""[...document.querySelectorAll('figure svg text')].map(text => {
        const box = text.getBoundingClientRect(), figure = text.closest('svg').getBoundingClientRect();
        const scale = figure.width / text.closest('svg').viewBox.baseVal.width;
        return [text.textContent.trim(), parseFloat(getComputedStyle(text).fontSize) * scale,
                Math.min(box.left - figure.left, figure.right - box.right),
                Math.min(box.top - figure.top, figure.bottom - box.bottom)];
    })""")  # type: ignore[attr-defined]
    assert len(labels) > 50
    for text, height_px, inside_x_px, inside_y_px in labels:
        assert height_px >= 9, (text, height_px, width)
        assert inside_x_px >= -3, (text, inside_x_px, width)
        assert inside_y_px >= -3, (text, inside_y_px, width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(browser: "Browser", pages: list[Path], scheme: str) -> None:
    """By axe-core's rules, best practices among them; in the dark, which changes colours only, those of contrast.

    It leaves to others the contrast of text in drawings, which is checked here, and of cells that are scrolled away,
    whose colours are those of their neighbours.
    """
    axe = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    some = "{runOnly: ['color-contrast']}" if scheme == "dark" else "{}"
    for path in pages[:1] if scheme == "dark" else pages:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        page.goto(path.as_uri())
        if path == pages[0]:  # of one run all; of several what is the same in each stays folded
            page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        page.evaluate(axe)
        found = page.evaluate(f"axe.run({{exclude: ['svg text']}}, {some})")
        assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []
        assert len(found["passes"]) >= (1 if scheme == "dark" else 30)
        undecided = [node["html"] for each in found["incomplete"] for node in each["nodes"]]
        assert [each for each in undecided if not each.startswith(("<td", "<th "))] == []
        _check_contrast_of_drawings(page)
        page.close()


def _check_contrast_of_drawings(page: "Page") -> None:
    """WCAG's 4.5 for text beside marks, and 3 for marks, lines of networks among them, on the page's own ground."""
    ratios = page.evaluate("""(() => {
        const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(value => {
            value /= 255; return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const ground = light(getComputedStyle(document.body).backgroundColor);
        const white = 'rgb(254, 254, 254)';
        const text = [...document.querySelectorAll('figure svg text')].map(each => getComputedStyle(each).fill);
        const marks = [...document.querySelectorAll('.hand .mark')].map(each => getComputedStyle(each).stroke);
        return [text.filter(colour => colour !== white).map(colour => ratio(light(colour), ground)),
                marks.map(colour => ratio(light(colour), ground))];
    })()""")
    text, marks = ratios
    assert min(text) >= 4.5
    assert min(marks) >= 3.0
    assert len(text) > 50
    assert len(marks) > 5


def test_every_point_is_told_to_mouse_and_keyboard(browser: "Browser", pages: list[Path]) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(pages[0].as_uri())
    spots = page.locator(".spot")
    assert spots.count() == 2 + 4  # files with a latency, and all networks by their size
    first, second = spots.nth(0), spots.nth(1)
    assert not first.locator(".tip").is_visible()
    first.locator(".ring").hover()
    assert first.locator(".tip").is_visible()
    second.focus()  # what is pointed at goes before what is focused: one box is shown
    assert first.locator(".tip").is_visible()
    assert not second.locator(".tip").is_visible()
    page.mouse.move(0, 0)
    assert second.locator(".tip").is_visible()
    page.keyboard.press("Tab")
    assert not second.locator(".tip").is_visible()
    assert page.evaluate("document.activeElement.className") == "spot"
    told = [spots.nth(index).get_attribute("aria-label") or "" for index in range(6)]
    assert any("Student INT8, ships. 95.6\xa0% of 540 test images right" in text for text in told)
    # The mark under the ring is that of the drawing.
    mark, ring = page.locator(".plot").first.locator("svg .mark").first, first.locator(".ring")
    boxes = mark.bounding_box(), ring.bounding_box()
    assert boxes[0]
    assert boxes[1]
    for side, size in (("x", "width"), ("y", "height")):
        middle = [box[side] + box[size] / 2 for box in boxes]  # type: ignore[literal-required]
        assert abs(middle[0] - middle[1]) < 2.5
    page.close()


@pytest.mark.parametrize(("scheme", "ground", "int8"), [
    ("light", (255, 255, 255), (194, 78, 0)), ("dark", (20, 24, 29), (245, 138, 60)),
])  # fmt: skip
def test_what_is_painted(
    browser: "Browser", pages: list[Path], scheme: str, ground: tuple[int, ...], int8: tuple[int, ...], tmp_path: Path
) -> None:
    """A picture of the whole page: its ground, and the mark of what ships, filled, where its ring is."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page.goto(pages[0].as_uri())
    place = page.locator(".plot").first.locator(".ring").nth(1).bounding_box()
    assert place
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.close()
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    assert picture.getpixel((3, 3)) == ground
    middle = (round(place["x"] + place["width"] / 2) - 2, round(place["y"] + place["height"] / 2) - 2)
    assert picture.getpixel(middle) == int8


def test_print_is_light_and_shows_what_is_folded(browser: "Browser", pages: list[Path]) -> None:
    page = browser.new_page(viewport={"width": 794, "height": 1123}, color_scheme="dark")
    page.goto(pages[0].as_uri())
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(31, 41, 51)"
    folded = "[...document.querySelectorAll('details table')].map(each => each.getBoundingClientRect().height)"
    assert min(page.evaluate(folded)) > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= 794  # paper does not scroll
    assert not page.locator(".hint").first.is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
