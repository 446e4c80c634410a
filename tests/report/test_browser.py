"""The page in a real browser: it renders, loads nothing, has no error, and its slider, zoom and modes work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from movq_cli.report import page
from movq_cli.run_history import RunHistory
from tests.doctor.record import RUNS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of the system without a window, and without a network."""
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed (pip install 'movq[report]')")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install 'movq[browser]')")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the PATH")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
def test_pages_render_without_a_network_and_their_controls_work(browser: Any, tmp_path: Path) -> None:
    tokenizer, compared = tmp_path / "tokenizer.html", tmp_path / "compared.html"
    page.write(tokenizer, [RunHistory.read(RUNS / "healthy-tokenizer")], None)
    page.write(compared, [RunHistory.read(RUNS / name) for name in ("healthy-prior", "overfitting")], None)
    assert tokenizer.stat().st_size < 5e6
    messages: list[str] = []
    requests: list[str] = []
    with browser.new_context(viewport={"width": 1280, "height": 900}, offline=True) as context:
        tab = context.new_page()
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        for path in (compared, tokenizer):
            tab.goto(path.as_uri())
            charts = tab.locator("figure.chart").count()
            tab.wait_for_function(f"document.querySelectorAll('.plot svg').length == {charts}", timeout=20_000)
            assert charts >= 5
        assert messages == []
        assert [url for url in requests if not url.startswith(("data:", "file://"))] == []
        assert {url for url in requests if url.startswith("file:")} == {tokenizer.as_uri(), compared.as_uri()}
        _check_film(tab)
        _check_modes(tab)
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert messages == []


def _check_film(tab: Any) -> None:
    """The slider changes the reconstructions and not the originals; the zoom enlarges both."""
    sources = "[...document.querySelectorAll('figure.film img')].map(image => image.src)"
    last = tab.evaluate(sources)
    assert tab.evaluate("[...document.querySelectorAll('figure.film img')].every(image => image.naturalWidth == 128)")
    tab.locator("figure.film input[type=range]").first.fill("0")
    first = tab.evaluate(sources)
    assert [before == after for before, after in zip(last, first, strict=True)] == [True, False, False]
    assert tab.locator("figure.film output").first.inner_text() == "step 160"
    width = tab.locator("figure.film img").first.bounding_box()["width"]
    tab.locator("figure.film select").first.select_option("8")
    assert tab.locator("figure.film img").first.bounding_box()["width"] == 8 * 128 != width


def _check_modes(tab: Any) -> None:
    """The colors of page and charts follow the mode of the system, and printing hides the controls."""
    color = (
        "getComputedStyle(document.body).backgroundColor + getComputedStyle(document.querySelector('svg text')).fill"
    )
    colors = set()
    for mode in ("light", "dark"):
        tab.emulate_media(color_scheme=mode)
        colors.add(tab.evaluate(color))
    assert len(colors) == 2
    tab.emulate_media(media="print")
    assert not tab.locator("figure.film .controls button").first.is_visible()
    assert len(tab.pdf()) > 50_000
    tab.emulate_media(media="screen")
