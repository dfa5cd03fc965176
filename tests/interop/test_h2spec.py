"""A worker of ours against h2spec, a client that breaks the rules of RFC 9113 and RFC 7541, in one way per case."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.faults.conftest import StartWorker

from .conftest import HTTP
from .test_h2specd import LOG, decided_by_close
from .test_tls import certificate  # noqa: F401

CASES = 147
"""with --strict; a later version may have more"""
RUN_S = 120.0
"""for all cases, which take 2 s together; one that fails waits for 2 s"""

MAY_CLOSE = {
    "Sends invalid connection preface",  # RFC 9113 3.4: GOAWAY may be left out, that peer does not speak HTTP/2
    "Sends an invalid PING frame for connection close",  # what it asks for
}
"""h2spec is content with a closed connection wherever it wants an error code. In all other cases it has to get the code."""


@pytest.mark.hard_timeout(RUN_S + 20)
@pytest.mark.parametrize("page", ["/live", "{root}/f/w/echo"], ids=["page", "endpoint"])
@pytest.mark.parametrize("secure", [False, True], ids=["h2c", "tls"])
def test_h2spec(
    start_worker: StartWorker,
    certificate: tuple[Path, Path],  # noqa: F811
    page: str,
    secure: bool,
) -> None:
    h2spec = shutil.which("h2spec")
    if h2spec is None:
        pytest.skip("h2spec is missing: docs/http2-conformance.md says where it comes from")
    cert, key = certificate
    tls = {"http_tls_cert": cert, "http_tls_key": key} if secure else {}
    # It takes 2^14 for the largest frame in http2/4.2/3, without looking at our SETTINGS.
    url = urlsplit(start_worker(**HTTP, http_max_frame_size=16384, **tls).address)
    target = ("--host", str(url.hostname), "--port", str(url.port), "--path", page.format(root=url.path))
    command = [h2spec, "--strict", "--verbose", *target, *(("--tls", "--insecure") if secure else ())]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=RUN_S)
    log = LOG.sub("", done.stdout.decode(errors="replace"))
    result = re.search(r"^(\d+) tests, (\d+) passed, 0 skipped, 0 failed$", log, re.MULTILINE)
    assert result is not None and done.returncode == 0, log
    assert int(result[1]) == int(result[2]) >= CASES
    assert decided_by_close(log) <= MAY_CLOSE, log
