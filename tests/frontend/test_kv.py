"""``--router-mode kv``: metrics and live page, with simulated engines that publish events, and two frontends that share load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .browser import browser
from .stack import Deployment, Frontend, until

pytest.importorskip("zmq")

LONG = "tell me again of the ship that sailed along the coast of the long island in the summer of the great storm " * 3
EVENTS = {"DYN_EVENT_PLANE": "zmq"}


def engines(deployment: Deployment, count: int) -> None:
    for _ in range(count):
        process = deployment.start("-m", "dynwire.mocker", "--block-size", "4", "--num-blocks", "1000", **EVENTS)
        process.line("serving")


def metrics(frontend: Frontend) -> dict[str, float]:
    """Samples of the routers, without the labels of model and endpoint."""
    text = frontend.get("/metrics").text
    found = {}
    for name, labels, value in re.findall(r"^dynwire_router_(\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        # prometheus-client writes them in an order of its own
        rest = sorted(set(labels.split(",")) - {'model="tiny"', 'endpoint="dynwire.backend.generate"'})
        found[",".join([name, *rest])] = float(value)
    return found


def connected(frontend: Frontend, workers: int) -> bool:
    """Whether the events of all workers are followed."""
    seen = metrics(frontend)
    return seen.get("event_dumps_total", 0) >= workers and seen["index_ranks_behind"] == 0


@pytest.mark.hard_timeout(180)
def test_metrics_of_two_frontends(deployment: Deployment) -> None:
    engines(deployment, 2)
    arguments = ("--router-mode", "kv", "--router-replica-sync")
    first, second = (deployment.frontend(*arguments, **EVENTS) for _ in range(2))
    until(lambda: connected(first, 2) and connected(second, 2), "following the workers")
    until(lambda: metrics(first)["replicas"] == 1 and metrics(second)["replicas"] == 1, "knowing each other")

    for _ in range(2):
        assert first.chat(LONG, max_tokens=4).status_code == 200
        until(lambda: metrics(first)["index_blocks"] > 10)
    seen = metrics(first)
    assert (seen["decisions_total"], seen["reported_requests_total"], seen["exact_predictions_total"]) == (2, 2, 2)
    assert seen["prompt_blocks_total"] > seen["predicted_hit_blocks_total"] == seen["reported_hit_blocks_total"] > 10
    assert (seen["by_load_only_total"], seen["event_gaps_total"], seen["active_requests"]) == (0, 0, 0)
    assert seen["event_plane_connected"] == 1 and seen["index_bytes"] > 1000 and seen["index_staleness_seconds"] == 0
    cached = [value for name, value in seen.items() if name.startswith("worker_cached_blocks")]
    assert len(cached) == 2 and sum(cached) == seen["index_blocks"]

    # the other one has the same index, and hears of what runs
    until(lambda: metrics(second)["index_blocks"] == seen["index_blocks"])
    with first.stream(LONG, max_tokens=1000, ignore_eos=True) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # kept: without it the response would be closed
        next(lines)
        until(lambda: sum(v for n, v in metrics(second).items() if n.startswith("worker_requests")) == 1)
        assert metrics(second)["active_requests"] == 0
    until(lambda: sum(v for n, v in metrics(second).items() if n.startswith("worker_requests")) == 0)
    assert metrics(second)["replica_messages_total"] > 0

    first.process.kill()  # says nothing to anybody
    until(lambda: metrics(second)["replicas"] == 0, "missing the other one")


def test_other_modes_have_no_such_metrics(deployment: Deployment) -> None:
    deployment.worker()
    frontend = deployment.frontend()
    assert "dynwire_router_" not in frontend.get("/metrics").text
    assert frontend.get("/state.json").json()["models"][0]["router"] is None


@pytest.mark.hard_timeout(180)
def test_page(deployment: Deployment, tmp_path: Path, free_port: int) -> None:
    engines(deployment, 2)
    frontend = deployment.frontend("--router-mode", "kv", **EVENTS)
    until(lambda: connected(frontend, 2))
    with browser(tmp_path, free_port) as page:
        page.open(frontend.url + "/")
        rate = "[data-name='cache hit rate'] b"
        until(lambda: page.run("return document.querySelectorAll('#workers tr.worker').length") == 2)
        assert page.text(rate) == "–"
        for _ in range(2):
            assert frontend.chat(LONG, max_tokens=4).status_code == 200
            until(lambda: metrics(frontend)["index_blocks"] > 10)
        until(lambda: re.fullmatch(r"(4\d|50) %", page.text(rate)), "a hit rate of nearly half")
        blocks = "return [...document.querySelectorAll('#workers tr.worker')].map(r => Number(r.cells[1].textContent)).sort()"
        until(lambda: page.run(blocks) == [0, metrics(frontend)["index_blocks"]], "blocks per worker")
        width = "return [...document.querySelectorAll('#workers .bar i')].map(i => parseFloat(i.style.width)).sort()"
        assert page.run(width) == [0, pytest.approx(metrics(frontend)["index_blocks"] / 10)]
        until(lambda: "found as expected: 100 % of the requests" in page.text("#predictions"))
        assert [entry for entry in page.log() if entry["level"] in ("SEVERE", "WARNING")] == []
