"""Models and workers that come and go, clients that leave, shutdowns, answers that move."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynwire.mocker import TINY_MODEL

from .conftest import SERVERS
from .stack import PATIENCE_S, Deployment, Frontend, Process, chat, events, until

CHAT = "/v1/chat/completions"


def text_of(found: list[str]) -> str:
    chunks = [json.loads(event) for event in found if event != "[DONE]"]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk.get("choices", ()))


def counted(number: int) -> str:
    """What ``count`` answers."""
    from tokenizers import Tokenizer

    from .worker import words

    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    return "".join(tokenizer.decode([i]) for i in words(tokenizer)[:number])


# Models -----------------------------------------------------------------------------------------------------------------------


def test_models_come_and_go(deployment: Deployment) -> None:
    frontend = deployment.frontend(models=0)
    health = frontend.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "no_models")
    assert frontend.chat("say hi").status_code == 404
    # two models behind one endpoint, one of them with two workers
    small = deployment.worker("small")
    first, second = deployment.worker("tiny"), deployment.worker("tiny")
    until(lambda: frontend.models() == ["small", "tiny"])
    until(lambda: len(instances(frontend, "tiny")) == 2)
    for name in ("small", "tiny"):
        for _ in range(4):
            response = frontend.post(CHAT, {**chat("about"), "model": name})
            assert response.json()["model"] == name
            assert json.loads(response.json()["choices"][0]["message"]["content"])["request"]["model"] == name
    first.stop()
    until(lambda: len(instances(frontend, "tiny")) == 1)
    assert frontend.chat("say hi").status_code == 200
    second.stop()
    until(lambda: frontend.models() == ["small"])
    assert frontend.chat("say hi").status_code == 404
    small.kill()  # without a word
    third = deployment.worker("tiny")
    until(lambda: "tiny" in frontend.models())
    assert frontend.chat("say hi").status_code == 200
    assert third.process.poll() is None


def instances(frontend: Frontend, name: str) -> list[Any]:
    return [i for model in frontend.get("/state.json").json()["models"] if model["id"] == name for i in model["instances"]]


def test_each_worker_answers_for_its_own_model(deployment: Deployment) -> None:
    """The endpoint is the same; a request must never come to a worker of the other model."""
    one, other = deployment.worker("one"), deployment.worker("other")
    frontend = deployment.frontend(models=2)
    for number in range(6):
        frontend.post(CHAT, {**chat(f"say {number}"), "model": "one"}).raise_for_status()
    frontend.post(CHAT, {**chat("refuse"), "model": "other"})
    other.noisy = True
    assert other.line("begin").startswith("begin refuse")
    for _ in range(6):
        assert one.line("begin").startswith("begin say")


def test_namespace(deployment: Deployment) -> None:
    deployment.worker("ours", "blue.backend.generate")
    deployment.worker("theirs", "green.backend.generate")
    frontend = deployment.frontend("--namespace", "blue")
    assert frontend.models() == ["ours"]
    assert deployment.frontend(models=2).models() == ["ours", "theirs"]


def test_workers_of_one_model_at_two_endpoints(deployment: Deployment) -> None:
    workers = [deployment.worker("tiny", f"{name}.backend.generate") for name in ("blue", "green")]
    frontend = deployment.frontend()
    until(lambda: len(instances(frontend, "tiny")) == 2)
    for _ in range(40):
        frontend.chat("say hi").raise_for_status()
    for worker in workers:
        worker.line("begin say")


def test_files_come_from_the_worker_if_its_disk_is_not_ours(deployment: Deployment, tmp_path: Path) -> None:
    hidden = tmp_path / "model"
    shutil.copytree(TINY_MODEL, hidden)
    deployment.worker("tiny", "test.backend.generate", str(hidden))
    shutil.rmtree(hidden)
    (hidden).mkdir()
    frontend = deployment.frontend(models=0)
    # the worker cannot read them any more either: that is said, and not taken for an unknown model
    until(lambda: frontend.chat("say hi").status_code == 503)
    until(lambda: "has no file" in frontend.chat("say hi").text)
    # back again, with the frontend looking at another place: what is at the path has another checksum
    shutil.copytree(TINY_MODEL, hidden, dirs_exist_ok=True)
    until(lambda: frontend.models() == ["tiny"])
    assert frontend.chat("say hi").json()["choices"][0]["message"]["content"] == "hi"


def test_worker_with_another_tokenizer_is_left_out(deployment: Deployment, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY_MODEL, other)
    source = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(source, indent=1))
    deployment.worker("tiny")
    frontend = deployment.frontend()
    deployment.worker("tiny", "test.backend.generate", str(other))
    until(lambda: "left out" in frontend.process.errors.read_text())
    assert len(instances(frontend, "tiny")) == 1


def test_broken_card_is_left_out(deployment: Deployment) -> None:
    script = """
import asyncio, dynwire
async def handler(request): return 1
async def main():
    async with dynwire.AsyncNetworkManager() as manager:
        await manager.endpoint("test.broken.generate").serve(handler, metadata={"model_card": "{"})
        await manager.endpoint("test.plain.generate").serve(handler)
        print("ready", flush=True)
        await asyncio.sleep(3600)
asyncio.run(main())
"""
    broken = deployment.start("-c", script)
    broken.line("ready")
    broken.noisy = True
    deployment.worker()
    frontend = deployment.frontend()
    assert frontend.chat("say hi").status_code == 200
    assert "cannot be read" in frontend.process.errors.read_text()
    broken.kill()


def test_other_plane_is_said(deployment: Deployment) -> None:
    pytest.importorskip("h2")
    deployment.worker("tiny", DYN_REQUEST_PLANE="http")
    frontend = deployment.frontend()
    response = frontend.chat("say hi")
    assert response.status_code == 503
    message = response.json()["error"]["message"]
    assert "http" in message and "tcp" in message and "DYN_REQUEST_PLANE" in message


@pytest.mark.parametrize("plane", ["tcp", "http", "nats"])
def test_planes(tmp_path: Path, plane: str, request: pytest.FixtureRequest) -> None:
    if plane == "http":
        pytest.importorskip("h2")
    deployment = Deployment(tmp_path / "deployment", plane)
    if plane == "nats":
        deployment.env["NATS_SERVER"] = request.getfixturevalue("nats_server").url
    try:
        deployment.mocker("--speedup-ratio", "1000")
        frontend = deployment.frontend()
        assert frontend.get("/state.json").json()["plane"] == plane
        with frontend.stream("Hello!", max_tokens=20, stream_options={"include_usage": True}) as response:
            found = events(response)
        assert json.loads(found[-2])["usage"]["completion_tokens"] == 20
        assert text_of(found)
        whole = frontend.chat("Hello!", max_tokens=20).json()["choices"][0]["message"]["content"]
        assert whole == text_of(found)
    finally:
        deployment.close()


@pytest.mark.parametrize("mode", ["kv", "round-robin"])
def test_router_mode(deployment: Deployment, mode: str) -> None:
    """With kv, a prompt goes where it went before; here without events, from the router's own decisions."""
    fields = ("test.backend.generate", str(TINY_MODEL), "block_size=16")
    workers = [deployment.worker("tiny", *fields) for _ in range(2)]
    frontend = deployment.frontend("--router-mode", mode, "--no-kv-events")
    until(lambda: len(instances(frontend, "tiny")) == 2)
    prompt = "say " + " ".join(f"word{n}" for n in range(100))
    began = serving(workers)
    seen = []
    for _ in range(4):
        frontend.chat(prompt).raise_for_status()
        seen.append(next(began).pid)
    assert len(set(seen)) == (1 if mode == "kv" else 2)


# Clients that leave -----------------------------------------------------------------------------------------------------------


def send(frontend: Frontend, body: dict[str, object]) -> socket.socket:
    data = json.dumps(body).encode()
    sock = socket.create_connection(frontend.address)
    sock.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(data)) + data)
    return sock


@pytest.mark.parametrize("server", SERVERS)
def test_client_that_leaves_cancels_the_worker(deployment: Deployment, server: str) -> None:
    worker = deployment.worker()
    frontend = deployment.frontend("--http-server", server)
    cases: list[tuple[str, dict[str, object]]] = [
        ("hang", {}),  # before the first token
        ("hang", {"stream": True}),
        ("count", {}),
        ("count", {"stream": True}),
        ("count", {"stream": True, "n": 2}),
    ]
    for verb, fields in cases:
        sock = send(frontend, chat("hang" if verb == "hang" else "count 600 0.01", **fields))
        copies = int(str(fields.get("n", 1)))
        for _ in range(copies):
            worker.line(f"begin {verb}")
        if verb == "count" and fields:
            assert sock.recv(1000)
        left = time.monotonic()
        sock.close()
        for _ in range(copies):
            took = float(worker.line(f"cut {verb}").split()[-1]) - left
            # a bound for a crowded machine; docs/frontend.md says what is measured on a quiet one
            assert 0 < took < 2.0
    until(lambda: frontend.get("/state.json").json()["in_flight"] == 0)
    assert frontend.get("/state.json").json()["models"][0]["disconnects"] == len(cases)
    assert frontend.chat("say hi").status_code == 200


@pytest.mark.parametrize("server", SERVERS)
def test_client_that_leaves_in_its_request(deployment: Deployment, server: str) -> None:
    deployment.worker()
    frontend = deployment.frontend("--http-server", server)
    with socket.create_connection(frontend.address) as sock:
        sock.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{" % CHAT.encode())
        until(lambda: frontend.get("/state.json").json()["in_flight"] == 1)
    until(lambda: frontend.get("/state.json").json()["in_flight"] == 0)
    assert frontend.get("/state.json").json()["refused"] == {"client_left": 1}


@pytest.mark.parametrize("server", SERVERS)
def test_client_that_does_not_read_makes_the_engine_wait(deployment: Deployment, server: str) -> None:
    """What it has not read stays within the buffers of sockets and planes, and others are not held up."""
    deployment.mocker("--speedup-ratio", "1000000", "--ends", "never")
    frontend = deployment.frontend("--http-server", server)
    sock = send(frontend, chat("Hello!", stream=True, max_tokens=32000, ignore_eos=True))
    assert sock.recv(100).startswith(b"HTTP/1.1 200")

    def made() -> int:
        return int(frontend.get("/state.json").json()["models"][0]["output_tokens"])

    for _ in range(5):
        assert frontend.chat("Hi", max_tokens=5).status_code == 200
    assert made() == 25  # those of the others: tokens are counted at the end of an answer
    assert frontend.get("/state.json").json()["in_flight"] == 1
    data = b""
    while b"[DONE]" not in data[-1000:]:
        part = sock.recv(1 << 20)
        assert part
        data += part
    until(lambda: made() == 32025)
    sock.close()


# Shutdown ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
def test_shutdown_waits_for_answers(deployment: Deployment, server: str) -> None:
    worker = deployment.worker()
    frontend = deployment.frontend("--http-server", server)
    idle = socket.create_connection(frontend.address)
    with frontend.stream("count 100 0.01") as response:
        worker.line("begin count")
        frontend.process.send_signal(signal.SIGTERM)
        until(lambda: frontend.get("/health").json()["status"] == "draining")
        assert frontend.get("/health").status_code == 503
        refused = frontend.chat("say hi")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        found = events(response)
    assert found[-1] == "[DONE]"
    assert text_of(found) == counted(100)
    assert frontend.process.process.wait(PATIENCE_S) == 0
    idle.close()


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("second", [False, True], ids=["grace", "second-signal"])
def test_shutdown_does_not_wait_for_ever(deployment: Deployment, server: str, second: bool) -> None:
    worker = deployment.worker()
    frontend = deployment.frontend("--http-server", server, "--grace", "3600" if second else "0.2")
    with frontend.stream("count 600 0.05") as response:
        worker.line("begin count")
        frontend.process.send_signal(signal.SIGTERM)
        if second:
            until(lambda: frontend.get("/health").json()["status"] == "draining")
            frontend.process.send_signal(signal.SIGINT)
        try:
            found = events(response)
        except httpx.RemoteProtocolError:
            found = []  # a second signal does not wait until everybody has heard why
        if found:
            assert json.loads(found[-1])["error"]["code"] == "shutting_down"
        else:
            assert second
    assert frontend.process.process.wait(PATIENCE_S) == (1 if second else 0)
    worker.line("cut count")


@pytest.mark.parametrize("server", SERVERS)
def test_port_in_use(deployment: Deployment, server: str) -> None:
    frontend = deployment.frontend("--http-server", server, models=0)
    port = frontend.address[1]
    other = deployment.start("-m", "dynwire.frontend", "--http-port", str(port), "--http-server", server)
    assert other.process.wait(PATIENCE_S) == 1
    text = other.errors.read_text()
    assert f"127.0.0.1:{port}" in text and "--http-port" in text and "DYN_HTTP_PORT" in text


def test_wrong_settings(deployment: Deployment) -> None:
    for arguments, text in (
        (("--router-mode", "psychic"), "DYN_ROUTER_MODE"),
        (("--http-port", "x"), "DYN_HTTP_PORT"),
        (("--request-plane", "pigeon"), "Invalid request plane mode"),
    ):
        process = deployment.start("-m", "dynwire.frontend", *arguments)
        assert process.process.wait(PATIENCE_S) == 2
        assert text in process.errors.read_text()


# Lost workers -----------------------------------------------------------------------------------------------------------------


def two_workers(deployment: Deployment) -> list[Process]:
    return [deployment.worker(), deployment.worker()]


def serving(workers: list[Process]) -> Iterator[Process]:
    """The worker that begins next."""
    import select

    while True:
        outs = {worker.process.stdout: worker for worker in workers if worker.process.poll() is None}
        ready, _, _ = select.select(list(outs), [], [], PATIENCE_S)
        for out in ready:
            if outs[out].line().startswith("begin"):
                yield outs[out]


def test_migration(deployment: Deployment) -> None:
    workers = two_workers(deployment)
    frontend = deployment.frontend("--migration-limit", "3")
    until(lambda: len(instances(frontend, "tiny")) == 2)
    began = serving(workers)
    fields = {"max_tokens": 500, "stream_options": {"include_usage": True}}
    with frontend.stream("count 500 0.004", **fields) as response:
        victim = next(began)
        lines = response.iter_lines()
        seen = [next(lines) for _ in range(200)]
        victim.kill()
        seen += lines
    found = [line.removeprefix("data: ") for line in seen if line]
    assert found[-1] == "[DONE]"
    assert text_of(found) == counted(500)
    assert json.loads(found[-2])["usage"]["completion_tokens"] == 500
    assert json.loads(found[-3])["choices"][0]["finish_reason"] == "length"
    assert frontend.get("/state.json").json()["models"][0]["migrations"] == 1


@pytest.mark.parametrize("stream", [True, False])
def test_migration_of_an_answer_with_stop_strings_and_in_one_piece(deployment: Deployment, stream: bool) -> None:
    workers = two_workers(deployment)
    frontend = deployment.frontend(DYN_MIGRATION_LIMIT="2")
    until(lambda: len(instances(frontend, "tiny")) == 2)
    expected = counted(300)
    stop = expected[-6:]
    sock = send(frontend, chat("count 400 0.004", max_tokens=400, stop=stop, stream=stream))
    victim = next(serving(workers))
    until(lambda: frontend.get("/state.json").json()["in_flight"] == 1)
    time.sleep(0.3)  # some tokens; where it breaks does not matter
    victim.kill()
    data = b""
    while (b"[DONE]" if stream else b"finish_reason") not in data:
        part = sock.recv(65536)
        assert part, data
        data += part
    sock.close()
    if stream:
        found = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: {")]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found)
    else:
        text = json.loads(data[data.index(b"\r\n\r\n{") + 4 :])["choices"][0]["message"]["content"]
    assert text == expected[: expected.index(stop)]


def test_without_migration_a_lost_worker_is_an_error_event_at_once(deployment: Deployment) -> None:
    workers = two_workers(deployment)
    frontend = deployment.frontend()
    until(lambda: len(instances(frontend, "tiny")) == 2)
    with frontend.stream("count 500 0.004") as response:
        victim = next(serving(workers))
        lines = response.iter_lines()
        seen = [next(lines) for _ in range(100)]
        victim.kill()
        seen += lines
    found = [line.removeprefix("data: ") for line in seen if line]
    assert json.loads(found[-1])["error"]["code"] == "worker_lost"
    assert counted(500).startswith(text_of(found))
    # others are served by the one that is left
    for _ in range(4):
        assert frontend.chat("say hi").status_code == 200


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2}])
def test_worker_that_refuses_is_replaced_by_another(deployment: Deployment, fields: dict[str, object]) -> None:
    full = deployment.worker("tiny", "test.backend.generate", str(TINY_MODEL), "max_in_flight=1")
    frontend = deployment.frontend()
    with frontend.stream("count 600 0.05") as response:
        full.line("begin count")
        assert response.status_code == 200
        refused = frontend.chat("say hi")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert "retry-after" in refused.headers
        deployment.worker()
        until(lambda: len(instances(frontend, "tiny")) == 2)
        for _ in range(6):
            assert frontend.chat("say hi", **fields).status_code == 200
            time.sleep(0.06)  # a worker that was busy is left alone for a moment


def test_last_worker_is_lost(deployment: Deployment) -> None:
    worker = deployment.worker()
    frontend = deployment.frontend("--migration-limit", "3")
    with send(frontend, chat("hang", stream=True)) as sock:
        worker.line("begin hang")
        worker.kill()
        assert sock.recv(1000).split()[1] in (b"502", b"503")
    until(lambda: frontend.models() == [])


def test_request_timeout(deployment: Deployment) -> None:
    worker = deployment.worker()
    frontend = deployment.frontend("--request-timeout", "0.3")
    response = frontend.chat("hang")
    assert response.status_code == 504
    worker.line("cut hang")
    with frontend.stream("count 600 0.05") as stream:
        found = events(stream)
    assert json.loads(found[-1])["error"]["code"] == "timeout"
