"""The page of a report in Chromium: charts, slider, x axis, languages, colors, print; no errors, nothing loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from unmask.report.write import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")

Browse = Callable[[Path], Any]
PATIENCE = 60.0


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browse]:
    """Opens a page in an English browser and waits until its charts are drawn; returns the driver."""
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.wait import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,900"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    agent = driver.execute_script("return navigator.userAgent")
    driver.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "en-US"})

    def opened(page: Path) -> Any:
        driver.get(page.as_uri())
        WebDriverWait(driver, PATIENCE).until(drawn)
        return driver

    yield opened
    driver.quit()


def drawn(driver: Any) -> bool:
    return bool(driver.execute_script("return document.documentElement.dataset.drawn === 'true'"))


def text_of(driver: Any, selector: str) -> str:
    return str(driver.find_element("css selector", selector).text)


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(runs / "first", tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def driver(browse: Browse, page: Path) -> Any:
    """The browser on the page of one run; the last two tests leave it."""
    return browse(page)


def test_charts_are_drawn_and_nothing_is_loaded(driver: Any, page: Path, hostile: str) -> None:
    charts = driver.find_elements("css selector", ".chart")
    assert len(charts) > 8
    for chart in charts:
        marks = chart.find_elements("css selector", "svg .mark-line path, svg .mark-rect path, svg .mark-symbol path")
        assert marks and chart.rect["width"] > 100, chart.get_attribute("data-chart")
        assert len(chart.get_attribute("aria-label")) > 10
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
    urls = {each["request"]["url"] for each in sent if each["documentURL"] == page.as_uri()}  # not of the first tab
    assert urls == {page.as_uri()}
    assert driver.execute_script("return document.querySelectorAll('script').length") == 3
    assert "alert(1)" in hostile and "alert(1)" in text_of(driver, ".sentences"), "the sentence is text"
    tags = driver.execute_script("return [...document.querySelectorAll('.sentences *')].map(each => each.tagName)")
    assert set(tags) == {"P", "MARK"}


def test_the_slider_works_by_keyboard(driver: Any) -> None:
    slider = driver.find_element("css selector", "input[type=range]")
    assert text_of(driver, ".slider output") == "step 6 of 6"
    slider.send_keys(Keys.HOME)
    assert text_of(driver, ".slider output") == "step 2 of 6"
    slider.send_keys(Keys.ARROW_RIGHT)
    assert text_of(driver, ".slider output") == "step 4 of 6" == slider.get_attribute("aria-valuetext")
    assert driver.find_elements("css selector", ".sentences mark")


def test_the_x_axis_changes_by_keyboard(driver: Any) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    chart = driver.find_element("css selector", "[data-chart=loss-0]")
    assert "step" in chart.text
    driver.find_element("css selector", "input[name=axis][value=step]").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    WebDriverWait(driver, PATIENCE).until(lambda driver: drawn(driver) and "tokens" in chart.text)
    ticks = driver.execute_script("return [...document.querySelectorAll('[data-chart=loss-0] .role-axis-label text')]"
                                  ".map(element => element.textContent)")  # fmt: skip
    assert any(tick.endswith("k") for tick in ticks), ticks


def test_colors_and_print(driver: Any) -> None:
    def background() -> str:
        return driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    theme = driver.find_element("css selector", "#theme")
    for name, color in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 28)")):
        theme.find_element("css selector", f"option[value={name}]").click()
        assert background() == color
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert background() == "rgb(255, 255, 255)" and not driver.find_element("css selector", ".controls").is_displayed()
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert not driver.find_elements("css selector", "details:not([open])")
    driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert driver.find_elements("css selector", "details:not([open])")


def test_the_words_are_korean_in_a_korean_browser(driver: Any, browse: Browse, page: Path) -> None:
    agent = driver.execute_script("return navigator.userAgent")
    driver.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "ko-KR"})
    browse(page)
    assert driver.execute_script("return document.documentElement.lang") == "ko"
    assert text_of(driver, "h2#curves") == "학습 곡선" and "검증" in text_of(driver, "[data-chart=loss-0]")
    assert text_of(driver, ".slider output") == "6스텝 중 6스텝"
    assert driver.find_element("css selector", "input[type=range]").get_attribute("aria-label") == "문장의 스텝"


def test_runs_of_several_tokenizers_in_a_narrow_window(browse: Browse, runs: Path, tmp_path: Path) -> None:
    path = write_report([runs / name for name in ("first", "second", "letters")], tmp_path / "compare.html")
    driver = browse(path)
    driver.set_window_size(520, 900)
    assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    for group, names in ((0, ("first", "second")), (1, ("letters",))):
        legend = text_of(driver, f"[data-chart=loss-{group}]")
        assert all(name in legend for name in names)
    assert driver.get_log("browser") == []
