"""Headless Chromium (Debian's `chromium` and `chromium-driver`) on the chat page: fixtures, and what a user does."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_server import MODEL, Answer, FakeServer, serving
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Far more than anything here takes; only a failing test waits as long.
PATIENCE_SECONDS = 15


@pytest.fixture(scope="session")
def server() -> Iterator[FakeServer]:
    with serving(FakeServer()) as fake:
        yield fake


@pytest.fixture(scope="session")
def driver() -> Iterator[webdriver.Chrome]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--window-size=1280,860", "--hide-scrollbars"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        # Chromium's sandbox refuses to run as root.
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield browser
    browser.quit()


class Page:
    """The page as its user has it."""

    def __init__(self, driver: webdriver.Chrome, server: FakeServer) -> None:
        self.driver, self.server = driver, server

    def open(self) -> None:
        self.driver.get(self.server.url)
        if not self.server.key:
            self.until(lambda: self.text("#model") == MODEL)

    def until(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE_SECONDS
        while not (value := condition()):
            assert time.monotonic() < end, f"in vain; the page ends with: {self.text('body')[-500:]!r}"
            time.sleep(0.01)
        return value

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)).strip()

    def texts(self, selector: str) -> list[str]:
        texts = self.run("return [...document.querySelectorAll(arguments[0])].map((node) => node.innerText)", selector)
        return [str(text).strip() for text in texts]

    def shown(self, selector: str) -> bool:
        return bool(self.run("return document.querySelector(arguments[0])?.checkVisibility() ?? false", selector))

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, modifier: str, key: str) -> None:
        ActionChains(self.driver).key_down(modifier).send_keys(key).key_up(modifier).perform()

    def click(self, selector: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def send(self, text: str) -> None:
        self.driver.find_element(By.ID, "message").send_keys(text, Keys.ENTER)

    def until_answered(self) -> None:
        self.until(lambda: not self.shown("#stop"))

    def ask(self, text: str, *script: Answer) -> str:
        self.server.script.extend(script)
        self.send(text)
        self.until_answered()
        return self.text(".turn:last-child .answer")

    def screen(self, width: int, height: int, scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.fixture
def page(driver: webdriver.Chrome, server: FakeServer) -> Iterator[Page]:
    """The open page; afterwards the browser must have had nothing to complain about, but answers that say no."""
    server.reset()
    page = Page(driver, server)
    page.screen(1280, 860)
    for log in ("browser", "performance"):
        driver.get_log(log)
    page.open()
    yield page
    page.run("sessionStorage.clear(); localStorage.clear()")
    assert [c for c in page.complaints() if not re.search(r"responded with a status of (401|503)", c)] == []
    entries = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    assert urls
    assert all(url.startswith(f"{server.url}/") for url in urls), urls
