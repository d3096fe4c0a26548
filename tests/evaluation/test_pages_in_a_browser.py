"""The pages of a run and of a search as headless Chromium shows them to a reader: on a screen, and on a phone."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from palf_dist.evaluation.report import make_report
from palf_dist.search.report import make_search_report
from tests.evaluation.synthetic import result_rows, write_run
from tests.search.test_report import write_search

pytestmark = pytest.mark.slow
SCREEN, PHONE = 1280, 500  # CSS pixels; Chromium makes no narrower window
CELLS = "return [...arguments[0].rows].map(row => [...row.cells].map(cell => cell.innerText))"
# Of each picture: its file's width, the page's, and how far right it reaches.
PICTURES = "return [...document.images].map(i => [i.naturalWidth, i.width, i.getBoundingClientRect().right, i.alt])"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        missing = "no browser: apt-get install --no-install-recommends chromium chromium-driver"
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    options = ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location, driver = map(str, programs)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options, Service(driver)) as started:
        yield started


def shown(browser: Chrome, page: Path, width: int) -> Image.Image:
    """A picture of the whole page at a window of that width, kept beside the page; nothing sticks out of the window,
    and the browser complains of nothing."""
    browser.set_window_size(width, 1000)
    browser.get(page.as_uri())
    wide, high, window = browser.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.scrollHeight, window.innerWidth]"
    )
    assert wide <= window, f"{page}: {wide} pixels wide in a window of {window}"
    browser.set_window_size(width, high + 150)
    assert browser.get_log("browser") == []
    (page.parent / f"{width}.png").write_bytes(png := browser.get_screenshot_as_png())
    return Image.open(io.BytesIO(png))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, int]]:
    """Each with how many pictures and tables it has."""
    folder = tmp_path_factory.mktemp("pages")
    report = make_report(write_run(folder / "run", results=result_rows()))
    search = make_search_report(write_search(folder / "search", [[0.5, 0.3], [0.4, 0.2], [0.35, 0.25]]))
    return {"run": (Path(report.page), 6, 5), "search": (Path(search.page), 2, 1)}


@pytest.mark.parametrize("width", [SCREEN, PHONE])
@pytest.mark.parametrize("kind", ["run", "search"])
def test_pictures_and_tables_are_there_to_be_read(kind: str, width: int, browser: Chrome, pages: dict) -> None:
    page, pictures, tables = pages[kind]
    picture = shown(browser, page, width)
    assert picture.width >= width - 20 and picture.height > 1000
    assert len(picture.convert("RGB").quantize(64).getcolors()) > 10, "it is not blank"

    images = browser.execute_script(PICTURES)
    assert len(images) == pictures
    for natural, drawn, right, name in images:
        assert natural > 300 and 300 < drawn <= natural and right <= width, name

    found = browser.find_elements(By.TAG_NAME, "table")
    assert len(found) == tables
    for table in found:
        header, *rows = browser.execute_script(CELLS, table)
        assert rows and all(header) and all(len(row) == len(header) and all(row) for row in rows), header
        assert table.find_element(By.CSS_SELECTOR, "tbody td").is_displayed()


def test_the_name_of_a_row_stays_where_a_wide_table_is_moved(browser: Chrome, pages: dict) -> None:
    page, *_ = pages["run"]
    shown(browser, page, PHONE)
    box = browser.find_element(By.CLASS_NAME, "wide")
    name, last = box.find_element(By.CSS_SELECTOR, "tbody td"), box.find_element(By.CSS_SELECTOR, "tbody td:last-child")
    before = name.location["x"], last.location["x"]
    assert before[1] > PHONE, "it is not wide enough for this test"
    browser.execute_script("arguments[0].scrollLeft = 10000", box)
    assert name.location["x"] == before[0] and name.location["x"] < last.location["x"] < PHONE


def test_what_is_folded_away_opens(browser: Chrome, pages: dict) -> None:
    page, *_ = pages["run"]
    shown(browser, page, SCREEN)
    for details in browser.find_elements(By.TAG_NAME, "details"):
        text = details.find_element(By.TAG_NAME, "pre")
        assert not text.is_displayed()
        details.find_element(By.TAG_NAME, "summary").click()
        assert text.is_displayed() and text.text.strip()
