"""The page in headless Chromium: silent, offline, no sideways scrolling, legible at 1280 and 400 px."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

from kdedge_bench import report
from kdedge_bench.facts import Facts

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser
MakeRun = Callable[..., Path]
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


@pytest.fixture
def pages(make_run: MakeRun, tmp_path: Path) -> list[Path]:
    """A usual page, and one of several runs with everything long and many."""
    usual = make_run()
    names = [
        f"number{index}of_the_very_long_names_without_a_single_space_that_a_flower_may_have" for index in range(60)
    ]
    long_name = "a-run-with-a-name-that-is-longer-than-anybody-should-make-it-but-somebody-will-2500-s17"
    ids = [f"x/{index}.jpg" for index in range(600)]
    many = make_run(long_name, classes=names, labels=np.arange(600) % 60, ids=ids,
                    right={"baseline": 200, "teacher": 550, "student": 500, "fp32": 500, "int8": 490})  # fmt: skip
    return [report([usual], load=noise), report([many, usual], tmp_path / "all.html", load=noise)]


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
