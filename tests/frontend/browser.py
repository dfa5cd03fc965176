"""A headless Chromium, driven over the WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from .stack import until

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    def __init__(self, session: httpx.Client) -> None:
        self._session = session

    def command(self, path: str, **body: Any) -> Any:
        response = self._session.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()["value"]

    def open(self, url: str) -> None:
        self.command("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript, ``return`` included."""
        return self.command("execute/sync", script=script, args=list(arguments))

    def element(self, selector: str) -> str:
        found = self.command("element", using="css selector", value=selector)
        return f"element/{found[ELEMENT]}"

    def click(self, selector: str) -> None:
        self.command(f"{self.element(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self.command(f"{self.element(selector)}/value", text=text)

    def text(self, selector: str) -> str:
        found: str = self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector)
        return found

    def log(self) -> list[dict[str, Any]]:
        """What the browser complained about since the last call."""
        response = self._session.post("se/log", json={"type": "browser"})
        found: list[dict[str, Any]] = response.json()["value"]
        return found


@contextmanager
def browser(directory: Path, port: int, visible: Callable[[str], None] = print) -> Iterator[Browser]:
    """Skips the test where Chromium or its driver is missing."""
    driver = shutil.which("chromedriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)")
    with (directory / "driver.log").open("wb") as log:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def ready() -> bool:
                try:
                    return bool(client.get("/status").json()["value"]["ready"])
                except httpx.TransportError:
                    return False

            until(ready, "chromedriver")
            arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"]
            options = {"binary": chromium, "args": [*arguments, f"--user-data-dir={directory / 'profile'}"]}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
            assert made.status_code == 200, made.text
            session = made.json()["value"]["sessionId"]
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}/session/{session}/", timeout=60) as inner:
                    yield Browser(inner)
            finally:
                client.delete(f"/session/{session}")
    finally:
        process.terminate()
        process.wait(20)
