"""Made-up run folders, and a real browser that looks at their pages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import MadeRun
from tiny_models import tiny_tokenizer

from rankup.grpo.cli.report.report import write_report
from rankup.grpo.cli.report.runs import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run", "--force-device-scale-factor=1"),
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with a token for each byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_run(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., MadeRun]:
    """Start a run folder of that name (see `MadeRun`)."""

    def make(name: str = "run", **options: Any) -> MadeRun:
        return MadeRun(tmp_path / name, **{"tokenizer": tokenizer_folder, **options})

    return make


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[..., Path]:
    """Write the page of some finished runs."""

    def write(*runs: MadeRun, max_bytes: int = 10_000_000) -> Path:
        output = tmp_path / "report.html"
        write_report([RunFolder(run.folder) for run in runs], output, max_bytes=max_bytes)
        return output

    return write


class Browser:
    """Chromium without a window. Elements go by CSS selectors."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        assert CHROMIUM is not None
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.set_page_load_timeout(120)
        self.driver.set_script_timeout(120)
        self.requests: list[str] = []
        self.errors: list[str] = []

    def open(self, page: Path | str, view: str = "curves", *, width: int = 1280, is_dark: bool = False) -> None:
        """Open a page, and wait until it shows a view."""
        driver = self.driver
        driver.get("about:blank")  # otherwise only the view of a page would change
        self.collect()
        self.requests, self.errors = [], []
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(f"{page if isinstance(page, str) else page.as_uri()}#{view}")
        self.until("return document.documentElement.dataset.ready === 'yes'")

    def collect(self) -> None:
        """Read the log of the browser: requests and errors until now."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
        self.errors += [entry["message"] for entry in self.driver.get_log("browser")]

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script that returns something."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *, seconds: float = 60.0) -> Any:
        """Wait until a script returns something true; returns that."""
        from selenium.webdriver.support.wait import WebDriverWait

        wait = WebDriverWait(self.driver, seconds, poll_frequency=0.05)
        return wait.until(lambda driver: driver.execute_script(script), script)

    def find(self, selector: str) -> Any:
        """The first element that fits."""
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """The content of all elements that fit and are shown."""
        shown = "[...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility())"
        return self.run(f"return {shown}.map((e) => e.textContent)", selector)

    def click(self, selector: str) -> None:
        """Click on the first element that fits."""
        self.find(selector).click()

    def press(self, *keys: str) -> None:
        """Press keys one after the other."""
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a list."""
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_value(value)

    def type(self, selector: str, text: str) -> None:
        """Replace the content of an input."""
        element = self.find(selector)
        element.clear()
        element.send_keys(text)


@pytest.fixture(scope="session")
def session_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    pytest.importorskip("selenium", reason="selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(session_browser: Browser) -> Iterator[Browser]:
    """The browser. Whatever a test did: the page has asked for nothing but itself, and nothing went wrong in it."""
    yield session_browser
    session_browser.collect()
    assert session_browser.errors == []
    here = ("file:", "data:", "about:", "http://127.0.0.1:")
    assert [url for url in session_browser.requests if not url.startswith(here)] == []
