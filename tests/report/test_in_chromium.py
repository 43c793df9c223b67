"""The page in a real browser: nothing in its console, everything visible, on a desk and on a phone, dark and light."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.made import make_run
from vl_dist import cli

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
VISIBLE_IMAGES = """return [...document.images].map(image => {
  image.scrollIntoView();
  return image.complete && image.naturalWidth > 0 && image.getBoundingClientRect().width > 40;
})"""
CURVES = """return [...document.querySelectorAll('svg g.dense, svg g.sparse')].map(group => {
  const line = group.querySelector('polyline.line, polyline.faint');
  const box = line.getBoundingClientRect(), frame = line.ownerSVGElement.getBoundingClientRect();
  const inside = box.left >= frame.left && box.right <= frame.right && box.top >= frame.top && box.bottom <= frame.bottom;
  return inside && box.width > 100 && getComputedStyle(line).stroke !== 'none';
})"""
COLOURS = """const style = getComputedStyle(document.body);
return [style.color, style.backgroundColor].map(text => text.match(/[0-9.]+/g).slice(0, 3).map(Number))"""


def _missing() -> str | None:
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed (Debian: chromium chromium-driver)" if absent else None


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    reason = _missing()
    if reason is not None:
        assert os.environ.get("REQUIRE_CHROMIUM") != "1", reason
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one long, one that was stopped, with hostile captions."""
    home = tmp_path_factory.mktemp("report")
    runs = [
        make_run(home / "first", num_rows=1500, evaluations=(0, 500, 1000, 1500)),
        make_run(home / ("long-name-" * 8), num_rows=900, evaluations=(0, 900), words=("optim.lr=3e-4",), seed=1),
    ]
    assert cli.main(["report", *map(str, runs), "--out", str(home / "page.html")]) == 0
    return home / "page.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_everything_is_seen_and_nothing_goes_wrong(browser: Any, page: Path, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    # Nothing sticks out, settings unfolded or not: what is wider scrolls inside its own frame.
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return innerWidth") == width
    images = browser.execute_script(VISIBLE_IMAGES)
    assert len(images) == 6 and all(images)
    curves = browser.execute_script(CURVES)
    assert len(curves) > 20 and all(curves)
    assert browser.title.startswith("vl_dist: first"), "markup in a caption did something"
    ink, ground = browser.execute_script(COLOURS)
    assert (sum(ink) < sum(ground)) == (scheme == "light") and abs(sum(ink) - sum(ground)) > 400
    assert browser.get_log("browser") == []


def test_pointing_at_a_chart_reads_its_values(browser: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(page.as_uri())
    figure = next(f for f in browser.find_elements("css selector", "figure") if "Learning rate" in f.text)
    svg = figure.find_element("css selector", "svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    ActionChains(browser).move_to_element(svg).perform()
    read = figure.find_element("css selector", "output").text
    assert "first" in read and "0.00005" in read.replace("5e-05", "0.00005")
    step = int(read.split("at step ")[1].split()[0].replace(",", ""))
    assert 600 < step < 900, "the pointer is in the middle of 1,500 steps"
    assert browser.get_log("browser") == []
