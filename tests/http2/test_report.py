"""The published table of conformance cases is what the tests find."""

from __future__ import annotations

from . import report


def test_the_table_is_up_to_date() -> None:
    text = report.render()
    assert "**fail**" not in text and "(?)" not in text
    assert report.FILE.read_text() == text, "run python -m tests.http2.report"
