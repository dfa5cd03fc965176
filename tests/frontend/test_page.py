"""The live page in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .browser import browser
from .stack import Deployment, until

PAGE = Path(__file__).parent.parent.parent / "dynwire" / "frontend" / "page.html"


def test_page_needs_nothing_from_elsewhere() -> None:
    text = PAGE.read_text()
    assert re.findall(r"""(?:src|href|url\(|import|fetch\()\s*=?\s*["']?(https?:|//)""", text) == []
    assert [url for url in re.findall(r"https?://[\w./]+", text) if "w3.org" not in url] == []


@pytest.mark.hard_timeout(180)
def test_page(deployment: Deployment, tmp_path: Path, free_port: int) -> None:
    worker = deployment.worker()
    frontend = deployment.frontend()
    response = frontend.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    with browser(tmp_path, free_port) as page:
        page.open(frontend.url + "/")
        until(lambda: page.text("#status").endswith("tcp plane"))
        assert "tiny" in page.text("#models")
        assert "test.backend.generate" in page.text("#models tr.instance")

        # a chat, streamed
        page.type("#message", "count 60 0.01\n")
        until(lambda: "tokens, first after" in page.text("#took"))
        assert len(page.text("#conversation p.assistant")) > 60
        assert page.text("#took").startswith("200 tokens")

        # charts and numbers follow
        until(lambda: page.run("return document.querySelectorAll('#ttft path, #gap path').length") == 4)
        until(lambda: "ms" in page.text("[data-name='between tokens, p50'] b"))

        # stopping reaches the worker
        page.type("#message", "hang\n")
        worker.line("begin hang")
        page.click("#stop")
        worker.line("cut hang")
        until(lambda: page.text("#took") == "stopped")

        # an error is shown, and text is never taken for markup
        page.type("#message", "refuse\n")
        until(lambda: "can never be answered" in page.text("#conversation p.error"))
        page.click("#clear")
        page.type("#message", "say <img src=x onerror=alert(1)><b>bold</b>\n")
        until(lambda: "<b>bold</b>" in page.text("#conversation p.assistant"))
        assert page.run("return document.querySelectorAll('#conversation img, #conversation b').length") == 0
        complaints = [entry["message"] for entry in page.log() if entry["level"] in ("SEVERE", "WARNING")]
        assert [text for text in complaints if "400" not in text] == []  # that was the refused one

        # the model leaves, and then the frontend
        worker.noisy = True
        worker.stop()
        until(lambda: "No worker has registered" in page.text("#models"))
        frontend.process.stop()
        until(lambda: page.text("#status") == "the frontend does not answer")


@pytest.mark.hard_timeout(180)
def test_page_asks_for_a_key(deployment: Deployment, tmp_path: Path, free_port: int) -> None:
    deployment.worker()
    frontend = deployment.frontend(DYNWIRE_API_KEYS="sesame")
    with browser(tmp_path, free_port) as page:
        page.open(frontend.url + "/")
        until(lambda: page.text("#status") == "an API key is needed")
        page.type("#key", "wrong")
        until(lambda: page.text("#status") == "this API key is not known")
        page.run("document.getElementById('key').value = ''")
        page.type("#key", "sesame")
        until(lambda: page.text("#status").endswith("tcp plane"))
        page.type("#message", "say open\n")
        until(lambda: page.text("#conversation p.assistant") == "open")
