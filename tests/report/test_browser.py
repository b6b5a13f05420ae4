"""Reports in a real browser, where selenium and chromium are: what the slider says is what Python counts."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_evaluation_page import HOSTILE, build, with_images

from retina.evaluation.confusion import confusion_matrix
from retina.evaluation.curves import GRID, counts_over_thresholds
from scenes import random_scene

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not (driver and chromium):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def requests(browser: Any) -> list[str]:
    """Addresses that the page asked for, other than itself."""
    import json

    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith(("data:", "file:///"))]


def test_the_page_does_what_python_says(browser: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    annotations, detections = random_scene(0, num_images=40)
    annotations = with_images(replace(annotations, classes=tuple(HOSTILE)), tmp_path)
    analysis, page = build(annotations, detections)
    (tmp_path / "report.html").write_text(page)
    browser.get(f"file://{tmp_path}/report.html")
    outcomes = analysis.outcomes
    hits, false = counts_over_thresholds(outcomes)
    objects = annotations.class_counts()
    find = browser.find_element
    move = "const s=document.getElementById('threshold');s.value=arguments[0];s.dispatchEvent(new Event('input'))"
    read = (
        "return [...document.querySelectorAll('#classes tbody tr')].map(r=>"
        "['hits','false','missed','precision','recall','f1'].map(c=>r.querySelector(`[data-col=${c}]`).textContent))"
    )
    for step in range(0, 100, 5):
        browser.execute_script(move, step)
        for label, row in enumerate(browser.execute_script(read)):
            h, f, n = int(hits[label, step]), int(false[label, step]), int(objects[label])
            shares = [f"{100 * h / (h + f):.1f} %" if h + f else "\u2013", f"{100 * h / n:.1f} %"]
            assert row[:3] == [str(h), str(f), str(n - h)], step
            for shown, expected in zip(row[3:5], shares, strict=True):
                assert shown == expected or abs(float(shown[:-2]) - float(expected[:-2])) < 0.11
        matrix = confusion_matrix(outcomes, outcomes.scores >= GRID[step])
        shown = browser.execute_script(
            "return [...document.querySelectorAll('#confusion tbody tr')].map(r=>[...r.querySelectorAll('td')]"
            ".map(c=>+c.textContent))"
        )
        assert shown == matrix.tolist()
        visible = "return [...document.querySelectorAll('.gallery g[data-kind=%s]:not([hidden])')].length"
        counts = [browser.execute_script(visible % kind) for kind in ("hit", "false", "miss")]
        tallies = [element.text.split() for element in browser.find_elements("css selector", ".tally")]
        assert counts == [sum(int(words[place]) for words in tallies) for place in (0, 4, 2)]
    find("id", "back").click()
    first = browser.execute_script(read)[0]
    assert first[0] == str(analysis.values["at_the_point"][0]["hits"])

    find("css selector", "#kind option[value=miss]").click()
    kinds = browser.execute_script(
        "return [...document.querySelectorAll('.gallery g[data-kind]:not([hidden])')].map(g=>g.dataset.kind)"
    )
    assert set(kinds) == {"miss"}

    head = find("css selector", "#classes thead th:nth-child(2) button")
    head.click()
    down = [int(e.text) for e in browser.find_elements("css selector", "#classes tbody td:nth-child(2)")]
    assert down == sorted(down, reverse=True)
    assert browser.execute_script("return document.body.innerText").count('alert("1")') > 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert requests(browser) == []


@pytest.mark.parametrize("width", [400, 1600])
def test_nothing_is_wider_than_the_window(browser: Any, tmp_path: Path, width: int) -> None:
    annotations, detections = random_scene(0, num_images=10)
    _, page = build(with_images(annotations, tmp_path), detections)
    (tmp_path / "report.html").write_text(page)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get(f"file://{tmp_path}/report.html")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button,select,input')].filter(e=>!(e.textContent||e.ariaLabel||"
        "e.labels&&e.labels.length)).length"
    )
    assert unnamed == 0, "a screen reader has no name for it"
