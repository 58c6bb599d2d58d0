"""The HTML report in a real browser: nothing in its console, nothing asked of the network, readable everywhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from reports import EVIL, inspection, many, quantized
from web import serve

from hlwq_convert.conversion import convert
from hlwq_convert.histograms import worst_histograms
from hlwq_convert.html_report import make_page
from hlwq_convert.inspection import Inspection, inspect
from hlwq_convert.page_data import shown
from hlwq_convert.source import open_source
from hlwq_formats.reader import Reader

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: scripts/browser installs one")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with api.sync_playwright() as playwright:
        root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium has no sandbox for root
        flags = [*FLAGS, *(["--no-sandbox"] if root else [])]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(model: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the tiny model, with histograms."""
    with Reader(converted) as reader:
        result = inspect(converted)
        page = make_page(result, worst_histograms(reader, open_source(model), result))
    path = tmp_path_factory.mktemp("page") / "r.html"
    path.write_bytes(page)
    return path


class Visit:
    """A page that is open, with everything it complained about and asked for."""

    def __init__(self, browser: Browser, path: Path, width: int = 1100, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)

    def column(self, name: str) -> list[str]:
        """The texts of a column of the table."""
        titles = [title.split(" ↑")[0].split(" ↓")[0] for title in self.page.locator("#tensors th").all_text_contents()]
        return self.page.locator(f"#tensors tbody td:nth-child({titles.index(name) + 1})").all_text_contents()

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.page.close()
        if kind is None:
            assert self.complaints == []
            assert self.requests == [self.url]


def written(tmp_path: Path, result: Inspection) -> Path:
    (tmp_path / "r.html").write_bytes(make_page(result, []))
    return tmp_path / "r.html"


PAINTED = """canvas => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(new Uint32Array(pixels.buffer)).size;
}"""
"""Colours on a canvas."""

OVERFLOWING = """() => [...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".scroll") && e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))"""

OVERLAPPING = """() => {
  const found = [], texts = [...document.querySelectorAll("h1, h2, h3, p, dt, dd, li, em, figcaption, label, th, td")]
    .filter(e => e.textContent.trim() && e.getClientRects().length);
  const boxes = texts.map(e => e.getBoundingClientRect());
  for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < Math.min(texts.length, i + 60); j++) {
    const [a, b] = [boxes[i], boxes[j]];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    const apart = wide <= 1 || high <= 1 || texts[i].contains(texts[j]);
    if (!apart) found.push(texts[i].textContent + " / " + texts[j].textContent);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 700, 1100])
def test_all_is_drawn_and_nothing_overlaps(browser: Browser, report: Path, width: int, scheme: str) -> None:
    with Visit(browser, report, width, scheme) as visit:
        page = visit.page
        assert page.title() == "small.hlwq: hlwq report"
        assert page.locator("#figures dd").all_text_contents()[5] == "15 / 5"
        assert page.locator("#tensors tbody tr").count() == 20
        for kind, colours in (("sqnr", 4), ("bits", 3)):  # cells, ground, and the edges of letters
            assert page.locator(f"#{kind}-map canvas").evaluate(PAINTED) >= colours
        assert page.locator("#histogram svg polyline").count() == 2
        assert page.locator("#histogram svg polygon").count() == 1
        assert page.evaluate(OVERFLOWING) == []
        assert page.evaluate(OVERLAPPING) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, ground[4:-1].split(",")))
        assert brightness > 700 if scheme == "light" else brightness < 100


def test_colours_follow_the_system(browser: Browser, report: Path) -> None:
    with Visit(browser, report) as visit:
        first = "canvas => [...canvas.getContext('2d').getImageData(3, 3, 1, 1).data].join()"
        light = visit.page.locator("#bits-map canvas").evaluate(first)
        visit.page.emulate_media(color_scheme="dark")
        visit.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert visit.page.locator("#bits-map canvas").evaluate(first) != light


def test_the_table_sorts_filters_and_grows(browser: Browser, tmp_path: Path) -> None:
    tensors = [quantized(f"l.{i}.w", None if i == 7 else 20 + (i * 37 % 100) / 10) for i in range(100)]
    with Visit(browser, written(tmp_path, inspection(tensors))) as visit:
        page = visit.page
        first = [float(text) for text in visit.column("SQNR dB")]
        assert len(first) == 50 and first == sorted(first) and first[0] == 20.0
        page.click("#more")
        assert page.locator("#tensors tbody tr").count() == 100
        assert visit.column("SQNR dB")[-1] == "–"
        assert page.locator("#more").is_hidden()
        page.click("#tensors th:nth-child(1) button")
        assert visit.column("tensor")[:3] == ["l.0.w", "l.1.w", "l.2.w"]
        page.click("#tensors th:nth-child(1) button")
        assert visit.column("tensor")[:2] == ["l.99.w", "l.98.w"]
        page.fill("#filter", "L.1")
        api.expect(page.locator("#tensors tbody tr")).to_have_count(11)
        assert page.locator("#count").text_content() == "11 of 11 found, of 100"


def test_a_cell_names_itself_and_leads_to_its_tensor(browser: Browser, report: Path) -> None:
    with Visit(browser, report) as visit:
        canvas = visit.page.locator("#sqnr-map canvas")
        canvas.hover(position={"x": 40, "y": 30})
        tip = visit.page.locator("#tip").text_content() or ""
        assert tip.startswith("layer 1, mlp.gate_proj: ") and " dB, " in tip
        canvas.click(position={"x": 40, "y": 30})
        assert visit.column("tensor") == ["model.layers.1.mlp.gate_proj.weight"]


def test_levels_of_a_trellis_are_ticks_in_two_rows(browser: Browser, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "t.hlwq", bpw=4.5)
    with Reader(tmp_path / "t.hlwq") as reader:
        result = inspect(tmp_path / "t.hlwq")
        histograms = worst_histograms(reader, open_source(model), result)
    (tmp_path / "r.html").write_bytes(make_page(result, histograms))
    with Visit(browser, tmp_path / "r.html", 375) as visit:
        ticks = visit.page.locator("#histogram svg line[stroke='var(--level)']")
        rows = ticks.evaluate_all("lines => lines.map(line => line.getAttribute('y1'))")
        assert len(rows) == sum(abs(level) <= 4.5 for level in histograms[0].levels) > 20
        assert len(set(rows)) == 2 and all(a != b for a, b in pairwise(rows))
        assert "levels of the trellis" in visit.page.locator("#histogram-key").inner_text()
        assert "each row divided by its scale" in visit.page.locator("#histogram-note").inner_text()
        assert visit.page.evaluate(OVERFLOWING) == []
        assert visit.page.evaluate(OVERLAPPING) == []


def test_another_histogram_is_chosen(browser: Browser, report: Path) -> None:
    with Visit(browser, report) as visit:
        before = visit.page.locator("#histogram svg").inner_html()
        visit.page.select_option("#histogram-select", index=3)
        assert visit.page.locator("#histogram svg").inner_html() != before


def test_hostile_texts_are_texts(browser: Browser, tmp_path: Path) -> None:
    tensors = [quantized(EVIL, reason=EVIL), quantized(f"l.0.{EVIL}"), quantized(f"a.{EVIL}.0.{EVIL}")]
    with Visit(browser, written(tmp_path, inspection(tensors, EVIL))) as visit:
        visit.page.locator("#sqnr-map canvas").hover(position={"x": 5, "y": 30})
        assert shown(EVIL) in (visit.page.locator("#tip").text_content() or "")
        assert sorted(visit.column("tensor")) == sorted(shown(tensor.name) for tensor in tensors)
        assert visit.page.locator("img, script").count() == 2  # data and script
        assert visit.page.evaluate("window.pwned") is None
        assert visit.page.evaluate(OVERFLOWING) == []


def test_the_policy_holds(browser: Browser, report: Path) -> None:
    with serve() as web:
        visit = Visit(browser, report)
        page = visit.page
        refused = page.evaluate(
            """url => {
              const image = document.createElement("img"), script = document.createElement("script");
              image.src = url + "/image";
              script.textContent = "window.pwned = 1";
              document.body.append(image, script);
              return fetch(url + "/fetch").then(() => false, () => true);
            }""",
            web.url,
        )
        assert refused is True
        assert page.evaluate("window.pwned") is None
        page.close()
        assert web.requests == []
        assert sum("Content Security Policy" in complaint for complaint in visit.complaints) >= 3


def test_a_page_served_over_http_asks_for_nothing_else(browser: Browser, report: Path) -> None:
    with serve() as web:
        web.files["/r.html"] = report.read_bytes()
        page = browser.new_page()
        page.goto(f"{web.url}/r.html")
        assert page.locator("#tensors tbody tr").count() == 20
        page.close()
        assert [path for path, _ in web.requests] == ["/r.html"]


def test_60_000_tensors(browser: Browser, tmp_path: Path) -> None:
    with Visit(browser, written(tmp_path, many()), 375) as visit:
        assert visit.page.locator("#tensors tbody tr").count() == 50
        assert visit.page.locator("#count").text_content() == "50 of 59,940"
        assert len(visit.page.locator("#sqnr-map .labels code").all()) == 3
        visit.page.fill("#filter", "layers.59.mlp.experts.332.")
        api.expect(visit.page.locator("#tensors tbody tr")).to_have_count(3)


def test_a_file_of_nothing(browser: Browser, tmp_path: Path) -> None:
    with Visit(browser, written(tmp_path, inspection([]))) as visit:
        assert visit.page.locator("#count").text_content() == "0 of 0"
        assert visit.page.locator("#maps figure").first.is_hidden()
        assert "--against MODEL_DIR" in (visit.page.locator("#rotation-note").text_content() or "")


def test_a_file_without_a_report(browser: Browser, tmp_path: Path) -> None:
    tensors = [quantized(f"l.{i}.w", None) for i in range(4)]
    with Visit(browser, written(tmp_path, inspection(tensors))) as visit:
        assert visit.page.locator("#figures dd").all_text_contents()[3:5] == ["–", "–"]
        assert visit.column("SQNR dB") == ["–"] * 4
        visit.page.locator("#sqnr-map canvas").hover(position={"x": 5, "y": 5})
        assert visit.page.locator("#tip").text_content() == "layer 0, w: – dB, 5.128 bits a weight"
