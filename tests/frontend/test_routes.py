"""Every route, with httpx and curl: bodies that are wrong, limits, keys, metrics."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .conftest import SERVERS, Shared
from .stack import PATIENCE_S, Deployment, Frontend, chat, events, split_events, until

CHAT = "/v1/chat/completions"


def error(response: object) -> dict[str, object]:
    """The envelope; checks its shape."""
    body = response.json()  # type: ignore[attr-defined]
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"  # type: ignore[attr-defined]
    found: dict[str, object] = body["error"]
    return found


BAD_BODIES = [
    ({"messages": [{"role": "user", "content": "say hi"}]}, "model"),
    ({"model": "tiny"}, "messages"),
    ({"model": "tiny", "messages": []}, "messages"),
    ({"model": "tiny", "messages": "hi"}, "messages"),
    ({"model": "tiny", "messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"model": "tiny", "messages": [{"role": "user"}]}, "messages[0].content"),
    ({"model": "tiny", "messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ({"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0]"),
    ({"model": "tiny", "messages": [{"role": "king", "content": "hi"}]}, "messages"),  # the template raises
    (chat("say hi", max_tokens="many"), "max_tokens"),
    (chat("say hi", max_tokens=0), "max_tokens"),
    (chat("say hi", max_completion_tokens=-1), "max_completion_tokens"),
    (chat("say hi", max_tokens=1_000_000), "max_tokens"),
    (chat("say hi", temperature=3), "temperature"),
    (chat("say hi", top_p=0), "top_p"),
    (chat("say hi", n=0), "n"),
    (chat("say hi", n=1000), "n"),
    (chat("say hi", stop=5), "stop"),
    (chat("say hi", stop=[""]), "stop"),
    (chat("say hi", stop=["x"] * 100), "stop"),
    (chat("say hi", stream="yes"), "stream"),
    (chat("say hi", stream_options={"include_usage": True}), "stream_options"),
    (chat("say hi", stream=True, stream_options={"include_usage": 5}), "stream_options.include_usage"),
    (chat("say hi", top_logprobs=3), "top_logprobs"),
    (chat("say hi", logprobs=True, top_logprobs=30), "top_logprobs"),
    (chat("say hi", response_format={"type": "json_object"}), "response_format"),
    (chat("say hi", logit_bias={"5": 1}), "logit_bias"),
    (chat("say hi", tool_choice="required"), "tool_choice"),
    (chat("say hi", functions=[{}]), "functions"),
    (chat("say hi", modalities=["audio"]), "modalities"),
    (chat("xq " * 40000), "messages"),
]  # fmt: skip


@pytest.mark.parametrize("shared", ["granian"], indirect=True)
@pytest.mark.parametrize(("body", "field"), BAD_BODIES, ids=[f"{n}-{field}" for n, (_, field) in enumerate(BAD_BODIES)])
def test_bad_body_names_the_field(frontend: Frontend, body: dict[str, object], field: str) -> None:
    response = frontend.post(CHAT, body)
    assert response.status_code == 400
    found = error(response)
    assert found["param"] == field
    assert found["type"] == "invalid_request_error"
    assert field.partition("[")[0] in str(found["message"])


@pytest.mark.parametrize("shared", ["granian"], indirect=True)
@pytest.mark.parametrize(("body", "field"), [
    ({"model": "tiny"}, "prompt"), ({"model": "tiny", "prompt": []}, "prompt"), ({"model": "tiny", "prompt": ""}, "prompt"),
    ({"model": "tiny", "prompt": [1, "x"]}, "prompt"), ({"model": "tiny", "prompt": [10**9]}, "prompt"),
    ({"model": "tiny", "prompt": [-1]}, "prompt"), ({"model": "tiny", "prompt": {}}, "prompt"),
    ({"model": "tiny", "prompt": "x", "echo": True}, "echo"), ({"model": "tiny", "prompt": "x", "best_of": 3}, "best_of"),
    ({"model": "tiny", "prompt": "x", "suffix": "y"}, "suffix"), ({"model": "tiny", "prompt": "x", "logprobs": 99}, "logprobs"),
    ({"model": "tiny", "prompt": ["x"] * 100, "n": 2}, "n"),
])  # fmt: skip
def test_bad_completion_names_the_field(frontend: Frontend, body: dict[str, object], field: str) -> None:
    response = frontend.post("/v1/completions", body)
    assert response.status_code == 400
    assert error(response)["param"] == field


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_body_that_is_no_json_object(frontend: Frontend, data: bytes) -> None:
    import httpx

    response = httpx.post(frontend.url + CHAT, content=data, timeout=PATIENCE_S)
    assert response.status_code == 400
    error(response)


def test_parts_of_text_are_joined(frontend: Frontend) -> None:
    parts = [{"type": "text", "text": "say on"}, {"type": "text", "text": "e two"}]
    response = frontend.post(CHAT, {"model": "tiny", "messages": [{"role": "user", "content": parts}]})
    assert response.json()["choices"][0]["message"]["content"] == "one two"


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/nothing", 404), ("POST", "/v1/chat", 404),
    ("GET", "/v1/models/none", 404), ("GET", "/v1/models/a/b", 404),
])  # fmt: skip
def test_wrong_urls_have_the_envelope_too(frontend: Frontend, method: str, path: str, status: int) -> None:
    import httpx

    response = httpx.request(method, frontend.url + path, timeout=PATIENCE_S)
    assert response.status_code == status
    error(response)


def test_health_live_and_openapi(frontend: Frontend) -> None:
    health = frontend.get("/health")
    assert (health.status_code, health.json()["status"], health.json()["models"]) == (200, "healthy", ["tiny"])
    assert frontend.get("/live").json() == {"status": "live"}
    document = frontend.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert {CHAT, "/v1/completions", "/v1/models", "/health", "/live", "/metrics"} <= set(document["paths"])
    properties = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"model", "messages", "stream", "stream_options", "max_completion_tokens", "ignore_eos"} <= set(properties)
    # every reference leads somewhere
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert name in document["components"]["schemas"]


def test_state(frontend: Frontend) -> None:
    state = frontend.get("/state.json").json()
    (model,) = state["models"]
    (instance,) = model["instances"]
    assert (model["id"], instance["plane"], instance["endpoint"]) == ("tiny", "tcp", "test.backend.generate")
    assert re.fullmatch("[0-9a-f]{16}", instance["id"])


def metric(frontend: Frontend, name: str) -> float:
    """A sample of /metrics; 0 if it is not there yet."""
    found = re.search(rf"^dynwire_frontend_{re.escape(name)} (\S+)$", frontend.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics(frontend: Frontend) -> None:
    names = [
        'requests_total{endpoint="chat",model="tiny",status="200",type="stream"}',
        'requests_total{endpoint="chat",model="tiny",status="500",type="stream"}',
        'output_tokens_total{model="tiny"}',
        'inter_token_latency_seconds_count{model="tiny"}',
        'time_to_first_token_seconds_count{model="tiny"}',
        'refused_requests_total{reason="status_404"}',
    ]
    before = {name: metric(frontend, name) for name in names}
    with frontend.stream("count 20 0.01") as response:
        events(response)
    with frontend.stream("fail 5 0.01") as response:
        events(response)
    frontend.post(CHAT, {**chat("x"), "model": "huge"})
    until(lambda: metric(frontend, 'inflight_requests{model="tiny"}') == 0)
    grown = {name: metric(frontend, name) - before[name] for name in names}
    assert grown == dict(zip(names, [1, 1, 25, 23, 2, 1], strict=True))
    assert frontend.get("/metrics").headers["content-type"].startswith("text/plain")
    assert "python_info" in frontend.get("/metrics").text


def test_models_that_clients_invent_are_no_labels(frontend: Frontend) -> None:
    for number in range(5):
        frontend.post(CHAT, {**chat("x"), "model": f"invented-{number}"})
    assert "invented" not in frontend.get("/metrics").text


def test_request_id(frontend: Frontend) -> None:
    response = frontend.post(CHAT, chat("about"), headers={"x-request-id": 'mine-"1'})
    assert response.headers["x-request-id"] == 'mine-"1'
    assert json.loads(response.json()["choices"][0]["message"]["content"])["id"] == 'mine-"1'
    for bad in ("", "a b", "x" * 200):
        given = frontend.post(CHAT, chat("say hi"), headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", given)


def test_failure_in_mid_stream_is_an_event_and_not_silence(frontend: Frontend) -> None:
    with frontend.stream("fail 3 0.01") as response:
        found = events(response)
    assert response.status_code == 200
    last = json.loads(found[-1])
    assert set(last) == {"error"}
    assert last["error"]["code"] == "engine_error"
    assert "[DONE]" not in found


def test_failure_before_the_first_token_is_a_status(frontend: Frontend) -> None:
    with frontend.stream("fail 0") as response:
        response.read()
    assert response.status_code == 500
    assert "out of memory" in str(error(response)["message"])


def test_stream_of_several_that_fails(frontend: Frontend) -> None:
    with frontend.stream("fail 3 0.01", n=3) as response:
        found = events(response)
    assert json.loads(found[-1])["error"]["code"] == "engine_error"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(frontend: Frontend) -> None:
    command = ["curl", "-sSN", "-i", frontend.url + CHAT, "-H", "Content-Type: application/json", "-d"]
    done = subprocess.run([*command, json.dumps(chat("say one two", stream=True))], capture_output=True, check=True)
    head, _, body = done.stdout.decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200")
    assert "content-type: text/event-stream" in head.lower()
    chunks = split_events(body)
    assert chunks[-1] == "[DONE]"
    assert "".join(json.loads(c)["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "one two"
    done = subprocess.run([*command, json.dumps(chat("say one two"))], capture_output=True, check=True)
    assert json.loads(done.stdout.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == "one two"


def test_accepted_connections_have_nodelay(shared: Shared) -> None:
    """Otherwise Nagle's algorithm meets the client's delayed acknowledgements, and tokens come 40 ms late."""
    frontend = shared.frontend
    with socket.create_connection(frontend.address) as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        with accepted(frontend.process.pid, sock.getsockname()) as theirs:
            assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@contextmanager
def accepted(pid: int, peer: tuple[str, int]) -> Iterator[socket.socket]:
    """Another process's end of a connection, as a descriptor of ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            fd = libc.syscall(SYS_PIDFD_GETFD, pidfd, int(name), 0)
            if fd < 0:
                if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
                    pytest.skip("this system does not let us look at another process's sockets")
                continue
            try:
                found = socket.socket(fileno=fd)
            except OSError:  # no socket
                os.close(fd)
                continue
            with found:
                try:
                    fits = found.getpeername() == peer
                except OSError:
                    continue
                if fits:
                    yield found
                    return
    finally:
        os.close(pidfd)
    pytest.fail(f"process {pid} has no connection with {peer}")


SYS_PIDFD_GETFD = 438
"""the same number on all architectures"""


# Limits and keys: settings of their own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
def test_body_limit(deployment: Deployment, server: str) -> None:
    deployment.worker()
    frontend = deployment.frontend("--http-server", server, "--body-limit-mb", "0.001")
    assert frontend.chat("say hi").status_code == 200
    response = frontend.chat("say " + "x" * 2000)
    assert response.status_code == 413
    assert "DYN_HTTP_BODY_LIMIT_MB" in str(error(response)["message"])

    def pieces() -> object:
        yield b'{"model": "tiny", "messages": [{"role": "user", "content": "'
        for _ in range(100):
            yield b"x" * 100

    import httpx

    response = httpx.post(frontend.url + CHAT, content=pieces(), timeout=PATIENCE_S)  # type: ignore[arg-type]
    assert response.status_code == 413
    assert frontend.chat("say hi").status_code == 200


def test_keys(deployment: Deployment) -> None:
    deployment.worker()
    keys = deployment.directory / "keys"
    keys.write_text("# of the team\nfile-key\n\n")
    frontend = deployment.frontend("--api-key-file", str(keys), DYNWIRE_API_KEYS="env-key, other-key")
    for key in ("file-key", "env-key", "other-key"):
        assert frontend.post(CHAT, chat("say hi"), headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert frontend.post(CHAT, chat("say hi"), headers={"x-api-key": "env-key"}).status_code == 200
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}, {"authorization": "env-key"},
                    {"authorization": "Bearer # of the team"}, {"authorization": "Basic env-key"}):  # fmt: skip
        response = frontend.post(CHAT, chat("say hi"), headers=headers)
        assert response.status_code == 401
        assert error(response)["code"] == "invalid_api_key"
    for path in ("/v1/models", "/v1/models/tiny", "/state.json"):
        assert frontend.get(path).status_code == 401
        assert frontend.get(path, headers={"authorization": "Bearer env-key"}).status_code == 200
    for path in ("/", "/health", "/live", "/metrics", "/openapi.json"):
        assert frontend.get(path).status_code == 200
    assert frontend.get("/openapi.json").json()["security"] == [{"key": []}]


def test_key_file_without_keys_does_not_open_the_door(deployment: Deployment) -> None:
    keys = deployment.directory / "keys"
    keys.write_text("# nothing\n")
    frontend = deployment.start("-m", "dynwire.frontend", "--http-port", "0", "--api-key-file", str(keys))
    assert frontend.process.wait(PATIENCE_S) == 2
    assert "holds no key" in frontend.errors.read_text()


def test_too_many_requests(deployment: Deployment) -> None:
    worker = deployment.worker()
    frontend = deployment.frontend("--max-in-flight", "1", "--retry-after", "7")
    with frontend.stream("count 600 0.05") as response:
        worker.line("begin count")
        assert response.status_code == 200
        refused = frontend.chat("say hi")
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "7"
    assert "DYNWIRE_FRONTEND_MAX_IN_FLIGHT" in str(error(refused)["message"])
    until(lambda: frontend.chat("say hi").status_code == 200)


def test_busy_workers(deployment: Deployment) -> None:
    worker = deployment.worker("tiny", *WHERE, 'limits={"max_sequences": 2}')
    frontend = deployment.frontend("--busy-threshold", "0.5")
    with frontend.stream("count 600 0.05") as response:
        worker.line("begin count")
        assert response.status_code == 200
        refused = frontend.chat("say hi")
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert error(refused)["code"] == "busy"
    assert "1 requests in flight for 2 sequences" in str(error(refused)["message"])
    until(lambda: frontend.chat("say hi").status_code == 200)


def tiny_model() -> str:
    from dynwire.mocker import TINY_MODEL

    return str(TINY_MODEL)


WHERE = ("test.backend.generate", tiny_model())
