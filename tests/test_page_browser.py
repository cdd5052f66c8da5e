"""The page as a browser lays it out: nothing overlaps, overflows or is fetched, on wide and narrow screens."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from llmsparse.page import report
from tests.results import scenes

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed; pip install playwright"
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
SCENES = ("one", "four", "unmeasured", "minimal", "long")

# Boxes of text that a reader would see: what is wider than the window, and what in one plot overlaps.
LAYOUT = """() => {
  const wide = [], overlapping = [], outside = [];
  const scrolled = e => e.closest('.scroll') !== null;
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (box.width && !scrolled(e) && !e.closest('svg') && (box.right > innerWidth + 0.5 || box.left < -0.5))
      wide.push(`${e.tagName}.${e.className} ${box.left} to ${box.right}`);
  }
  for (const svg of document.querySelectorAll('svg.plot')) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([a, p], i) => {
      if (p.left < frame.left - 2 || p.right > frame.right + 2 || p.bottom > frame.bottom + 2 || p.top < frame.top - 2)
        outside.push(`${svg.ariaLabel}: ${a}`);
      for (const [b, q] of texts.slice(i + 1))
        if (p.left < q.right - 0.5 && q.left < p.right - 0.5 && p.top < q.bottom - 2 && q.top < p.bottom - 2)
          overlapping.push(`${svg.ariaLabel}: ${a} and ${b}`);
    });
  }
  const cells = [...document.querySelectorAll('th, td, figcaption, .tile, summary, dt, dd, h1, h2, h3, .lead')];
  const boxes = cells.filter(e => e.getClientRects().length).map(e => [e, e.getBoundingClientRect()]);
  const spilled = boxes.filter(([e]) => e.scrollWidth > e.clientWidth + 1).map(([e]) => e.textContent.slice(0, 60));
  boxes.forEach(([e, p], i) => boxes.slice(i + 1, i + 25).forEach(([f, q]) => {
    if (!e.contains(f) && !f.contains(e) && p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1
        && q.top < p.bottom - 1) overlapping.push(`${e.textContent} and ${f.textContent}`);
  }));
  const smallest = Math.min(99, ...[...document.querySelectorAll('svg.plot text')].map(
    t => parseFloat(t.style.fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)));
  return {width: innerWidth, page: document.documentElement.scrollWidth, wide, overlapping, outside, spilled,
    smallest, background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color, plots: document.querySelectorAll('svg.plot').length};
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    options = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    options += ("--disable-component-update", "--disable-sync")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=list(options))
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = scenes(folder)
    for name in SCENES:
        report(runs[name], html=folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in SCENES}


def laid_out(browser: Any, page: Path, width: int, scheme: str = "light", style: str = "") -> dict[str, Any]:
    """The measured layout, everything unfolded; with the browser's complaints and requests."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    if style:
        tab.add_style_tag(content=style)
    found = tab.evaluate(LAYOUT) | {"complaints": complaints, "requests": requests}
    found["picture"] = imread(io.BytesIO(tab.screenshot(full_page=True)))[
        ..., :3
    ]  # (height, width, 3) of 0 to 1
    context.close()
    return found


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scene", SCENES)
def test_nothing_overlaps_or_overflows(browser: Any, pages: dict[str, Path], scene: str, width: int) -> None:
    found = laid_out(browser, pages[scene], width)
    assert found["width"] == width  # a narrow window is really narrow
    assert found["page"] <= width
    assert found["wide"] == found["overlapping"] == found["outside"] == found["spilled"] == []
    assert found["complaints"] == []
    assert [url for url in found["requests"] if not url.startswith(("file:", "data:"))] == []
    assert found["smallest"] >= 9  # CSS pixels: legible in plots


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_follows_the_reader_into_the_dark(browser: Any, pages: dict[str, Path], width: int) -> None:
    for scheme, is_dark in (("light", False), ("dark", True)):
        found = laid_out(browser, pages["four"], width, scheme)
        assert (brightness(found["background"]) < 60) is is_dark
        assert abs(brightness(found["background"]) - brightness(found["ink"])) > 150
        picture = found["picture"]  # what the reader's screen shows: mostly paper, and ink on it
        assert picture.shape[1] == width and picture.shape[0] > 3 * width
        assert bool(picture.mean() < 0.3) is is_dark and picture.max() - picture.min() > 0.7
        assert found["overlapping"] == []


def brightness(colour: str) -> float:
    red, green, blue = map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize(
    ("style", "seen"),
    [
        (".scroll { overflow: visible !important }", "page"),
        (".plot text { font-size: 26px !important }", "overlapping"),
        ("figcaption { white-space: nowrap; width: 700px }", "wide"),
        (".lead { height: 4px; margin-bottom: -30px !important } h3 { margin: 0 !important }", "overlapping"),
    ],
)
def test_these_checks_see_a_broken_layout(
    browser: Any, pages: dict[str, Path], style: str, seen: str
) -> None:
    found = laid_out(browser, pages["long"], 390, style=style)
    assert found[seen] > 390 if seen == "page" else found[seen]
