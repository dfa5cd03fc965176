"""Settings: every variable of REQUEST_PLANES §2, precedence, origins, errors that name what to change, masked secrets."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynwire.config import (
    Config,
    TcpConfig,
    advertised_host,
    child_environment,
    describe,
    detect_host,
    is_wildcard,
    load_config,
    mask_url,
    settings,
)
from dynwire.errors import ConfigError


def load(environ: dict[str, str] | None = None, **keywords: object) -> Config:
    return load_config(keywords, environ=environ or {})


# REQUEST_PLANES §2: variable, dotted name, default, another value as text, and parsed
TABLE = [
    ("DYN_REQUEST_PLANE", "request_plane", "tcp", "NATS", "nats"),
    ("DYN_TCP_RPC_HOST", "tcp.host", None, "0.0.0.0", "0.0.0.0"),
    ("DYN_TCP_RPC_PORT", "tcp.port", 0, "9999", 9999),
    ("DYN_TCP_MAX_MESSAGE_SIZE", "tcp.max_message_size", 33554432, "1048576", 1048576),
    ("DYN_TCP_REQUEST_TIMEOUT", "tcp.request_timeout", 10, "2.5", 2.5),
    ("DYN_TCP_POOL_SIZE", "tcp.pool_size", 50, "3", 3),
    ("DYN_TCP_CONNECT_TIMEOUT", "tcp.connect_timeout", 3, "0.5", 0.5),
    ("DYN_TCP_CHANNEL_BUFFER", "tcp.channel_buffer", 100, "7", 7),
    ("DYN_HTTP_RPC_HOST", "http.host", None, "::1", "::1"),
    ("DYN_HTTP_RPC_PORT", "http.port", 8888, "0", 0),
    ("DYN_HTTP_RPC_ROOT_PATH", "http.root_path", "/v1/rpc", "/x/y", "/x/y"),
    ("DYN_HTTP2_MAX_FRAME_SIZE", "http.max_frame_size", 1048576, "16384", 16384),
    ("DYN_HTTP2_MAX_CONCURRENT_STREAMS", "http.max_concurrent_streams", 1000, "1", 1),
    ("DYN_HTTP2_POOL_MAX_IDLE_PER_HOST", "http.pool_max_idle_per_host", 100, "0", 0),
    ("DYN_HTTP2_POOL_IDLE_TIMEOUT_SECS", "http.pool_idle_timeout", 90, "1", 1.0),
    ("DYN_HTTP2_KEEP_ALIVE_INTERVAL_SECS", "http.keep_alive_interval", 30, "1", 1.0),
    ("DYN_HTTP2_KEEP_ALIVE_TIMEOUT_SECS", "http.keep_alive_timeout", 10, "1", 1.0),
    ("DYN_HTTP2_ADAPTIVE_WINDOW", "http.adaptive_window", True, "Off", False),
    ("NATS_SERVER", "nats.servers", ("nats://localhost:4222",), "a:1, tls://b:2", ("nats://a:1", "tls://b:2")),
    ("NATS_AUTH_USERNAME", "nats.username", None, "u", "u"),
    ("NATS_AUTH_PASSWORD", "nats.password", None, "p", "p"),
    ("NATS_AUTH_TOKEN", "nats.token", None, "t", "t"),
    ("NATS_AUTH_NKEY", "nats.nkey", None, "n", "n"),
    ("NATS_AUTH_CREDENTIALS_FILE", "nats.credentials_file", None, "/c", "/c"),
    ("DYN_EVENT_PLANE", "events.plane", "nats", "jetstream", "jetstream"),
    ("DYN_DISCOVERY_BACKEND", "discovery.backend", "file", "etcd", "etcd"),
    ("DYN_FILE_KV", "discovery.file_dir", None, "/d", "/d"),
    ("ETCD_ENDPOINTS", "discovery.etcd_endpoints", ("http://localhost:2379",), "https://e:1", ("https://e:1",)),
    ("DYN_HTTP_PORT", "system.http_port", 8000, "80", 80),
    ("DYN_SYSTEM_PORT", "system.system_port", None, "9090", 9090),
    ("DYNWIRE_SYSTEM_HOST", "system.system_host", "127.0.0.1", "0.0.0.0", "0.0.0.0"),
]


@pytest.mark.parametrize(("env", "name", "default", "text", "value"), TABLE, ids=[row[0] for row in TABLE])
def test_every_public_variable(env: str, name: str, default: object, text: str, value: object) -> None:
    if name != "discovery.file_dir":
        assert load().get(name) == default
    config = load({env: text})
    assert config.get(name) == value
    assert config.origins[name] == f"env {env}"
    assert load().origins[name] == "default"
    # the same setting under its other names
    for key in (name, name.replace(".", "_"), env):
        assert load_config({key: text}, environ={}).get(name) == value


def test_own_settings_have_the_documented_defaults() -> None:
    config = load()
    assert config.codec == "msgpack" and config.default_timeout is None and config.token is None
    assert config.remote_tracebacks is False and config.strict is False
    assert 1 <= config.handler_threads <= 32
    assert config.tcp == TcpConfig()
    assert config.tcp.congestion == "auto" and config.tcp.spin_us == 0
    assert config.discovery.ttl == 10.0
    assert config == Config()


def test_precedence_and_origins(tmp_path: Path) -> None:
    path = tmp_path / "dynwire.toml"
    path.write_text('codec = "json"\n[tcp]\nport = 1\npool_size = 11\nchannel_buffer = 12\nconnect_timeout = 4\nspin_us = 5\n')
    environ = {
        "DYNWIRE_CONFIG": str(path),
        "DYN_TCP_RPC_PORT": "2",
        "DYN_TCP_POOL_SIZE": "21",
        "DYN_TCP_CHANNEL_BUFFER": "22",
        "DYN_TCP_CONNECT_TIMEOUT": "",
    }
    config = load_config({"tcp_port": 4}, cli={"tcp_port": 3, "tcp_pool_size": 31, "codec": None}, environ=environ)
    assert (config.tcp.port, config.tcp.pool_size, config.tcp.channel_buffer, config.tcp.connect_timeout) == (4, 31, 22, 4.0)
    assert config.codec == "json" and config.tcp.max_streams == 16384
    names = ["tcp.port", "tcp.pool_size", "tcp.channel_buffer", "tcp.connect_timeout", "codec", "tcp.max_streams"]
    assert [config.origins[name] for name in names] == [
        "keyword",
        "command line",
        "env DYN_TCP_CHANNEL_BUFFER",
        f"file {path}",
        f"file {path}",
        "default",
    ]


def test_an_empty_variable_is_not_set() -> None:
    assert load({"DYN_TCP_RPC_PORT": "", "DYN_REQUEST_PLANE": " ", "DYNWIRE_TOKEN": ""}) == Config()


# DYN_REQUEST_PLANE ----------------------------------------------------------------------------------------------------------


def test_invalid_plane_in_the_environment_means_tcp_and_one_error_line(caplog: pytest.LogCaptureFixture) -> None:
    config = load({"DYN_REQUEST_PLANE": "grpc"})
    assert config.request_plane == "tcp" and config.origins["request_plane"] == "default"
    (record,) = caplog.records
    text = record.getMessage()
    assert record.levelno == logging.ERROR and record.name == "dynwire.config"
    assert text.startswith("Invalid request plane mode")
    assert all(f"'{word}'" in text for word in ("grpc", "tcp", "http", "nats"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"overrides": {"request_plane": "grpc"}, "environ": {}},
        {"cli": {"request_plane": "grpc"}, "environ": {}},
        {"environ": {"DYN_REQUEST_PLANE": "grpc", "DYNWIRE_STRICT_CONFIG": "1"}},
        {"overrides": {"strict": True}, "environ": {"DYN_REQUEST_PLANE": "grpc"}},
    ],
)
def test_invalid_plane_elsewhere_raises(arguments: dict[str, dict[str, object]]) -> None:
    with pytest.raises(ConfigError, match=r"^Invalid request plane mode 'grpc'.*'tcp', 'http' or 'nats'") as caught:
        load_config(**arguments)  # type: ignore[arg-type]
    assert (caught.value.name, caught.value.value) == ("DYN_REQUEST_PLANE", "grpc")


def test_memory_plane_only_as_keyword(caplog: pytest.LogCaptureFixture) -> None:
    assert load(request_plane="memory").request_plane == "memory"
    assert load({"DYN_REQUEST_PLANE": "memory"}).request_plane == "tcp"
    assert caplog.records[0].levelno == logging.ERROR
    with pytest.raises(ConfigError):
        load_config(cli={"request_plane": "memory"}, environ={})


def test_keyword_hides_an_invalid_environment(caplog: pytest.LogCaptureFixture) -> None:
    assert load({"DYN_REQUEST_PLANE": "grpc"}, request_plane="http").request_plane == "http"
    assert not caplog.records


# Values ---------------------------------------------------------------------------------------------------------------------

BAD = [
    ("DYN_TCP_RPC_PORT", "70000", "integer from 0 to 65535"),
    ("DYN_TCP_RPC_PORT", "-1", "integer"),
    ("DYN_TCP_RPC_PORT", "http", "integer"),
    ("DYN_TCP_MAX_MESSAGE_SIZE", "32MB", "integer of bytes"),
    ("DYN_TCP_MAX_MESSAGE_SIZE", "1e400", "bytes"),
    ("DYN_TCP_MAX_MESSAGE_SIZE", "9" * 5000, "bytes"),
    ("DYN_TCP_REQUEST_TIMEOUT", "0", "number of seconds from 0.001"),
    ("DYN_TCP_REQUEST_TIMEOUT", "inf", "seconds"),
    ("DYN_TCP_REQUEST_TIMEOUT", "nan", "seconds"),
    ("DYN_TCP_RPC_HOST", "localhost:80", "no port"),
    ("DYN_TCP_RPC_HOST", "http://x", "host name or IP address"),
    ("DYN_TCP_RPC_HOST", "1::2::3", "IP address"),
    ("DYNWIRE_TCP_ADVERTISE_HOST", "0.0.0.0", "never a wildcard"),
    ("DYNWIRE_TCP_ADVERTISE_HOST", "[::]", "never a wildcard"),
    ("DYNWIRE_TCP_CONGESTION", "Reno!", "'auto', 'system'"),
    ("DYN_HTTP_RPC_ROOT_PATH", "v1", "begins with '/'"),
    ("DYN_HTTP2_MAX_FRAME_SIZE", "16383", "from 16384 to 16777215"),
    ("DYN_HTTP2_ADAPTIVE_WINDOW", "maybe", "true, false"),
    ("DYN_EVENT_PLANE", "kafka", "'jetstream', 'nats', 'zmq' or 'none'"),
    ("DYN_DISCOVERY_BACKEND", "consul", "'mem', 'file', 'etcd' or 'nats'"),
    ("NATS_SERVER", "http://x", "nats://host:port"),
    ("NATS_SERVER", "nats://x:99999", "nats://host:port"),
    ("NATS_SERVER", ",", "nats://host:port"),
    ("ETCD_ENDPOINTS", "nats://x", "http://host:port"),
    ("DYN_SYSTEM_PORT", "65536", "'off'"),
    ("DYNWIRE_CODEC", "pickle", "'msgpack' or 'json'"),
]


@pytest.mark.parametrize(("env", "text", "allowed"), BAD)
def test_bad_value_names_variable_value_and_what_is_allowed(env: str, text: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({env: text})
    message = str(caught.value)
    assert env in message and repr(text) in message and allowed in message and f"env {env}" in message
    assert caught.value.name == env and allowed in str(caught.value.allowed) and caught.value.value == text
    assert pickle.loads(pickle.dumps(caught.value)).name == env


@pytest.mark.parametrize("value", [b"1", 1.5, True, [], object()])
def test_bad_type_as_keyword(value: object) -> None:
    with pytest.raises(ConfigError, match="DYN_TCP_RPC_PORT"):
        load(tcp_port=value)


@pytest.mark.parametrize("word", ["true", "1", "YES", "on", " True "])
def test_flags(word: str) -> None:
    assert load({"DYNWIRE_REMOTE_TRACEBACKS": word}).remote_tracebacks is True


@pytest.mark.parametrize("word", ["off", "-1", "none"])
def test_words_for_none(word: str) -> None:
    assert load({"DYN_SYSTEM_PORT": word}).system.system_port is None


def test_none_as_keyword() -> None:
    environ = {"DYNWIRE_TOKEN": "t", "DYN_TCP_RPC_PORT": "5"}
    assert load(environ, token=None).token is None
    assert load(environ, tcp_port=None).tcp.port == 5


def test_paths_and_parts_as_keywords(tmp_path: Path) -> None:
    assert load(discovery_file_dir=tmp_path).discovery.file_dir == str(tmp_path)
    assert load(discovery="mem").discovery.backend == "mem"
    assert load(event_plane="zmq").events.plane == "zmq"
    assert load(tcp={"port": 7}).tcp.port == 7
    assert load(tcp=TcpConfig(port=8)).tcp.port == 8


def test_windows_must_fit_together() -> None:
    with pytest.raises(ConfigError, match=r"DYNWIRE_TCP_CONNECTION_WINDOW.*DYNWIRE_TCP_STREAM_WINDOW"):
        load(tcp_connection_window=4096)


@given(st.text(max_size=40), st.sampled_from([s.env for s in settings()]))
def test_any_text_is_a_value_or_a_config_error(text: str, env: str) -> None:
    if env == "DYNWIRE_CONFIG":
        return
    try:
        config = load({env: text})
    except ConfigError as error:
        assert error.name.startswith(("DYN", "NATS", "ETCD"))
    else:
        json.dumps(describe(config))


# Unknown names --------------------------------------------------------------------------------------------------------------


def test_unknown_keyword_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'tcp_prot'.*did you mean 'tcp_port'") as caught:
        load(tcp_prot=1)
    assert caught.value.name == "tcp_prot"
    with pytest.raises(ConfigError, match=r"DYN_TCP_RPC_PORT"):
        load_config({"DYN_TCP_RPC_PROT": 1}, environ={})
    with pytest.raises(ConfigError, match="twice"):
        load_config({"tcp_port": 1, "DYN_TCP_RPC_PORT": 2}, environ={})


def test_unknown_variables_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    load({"DYN_TCP_RPC_PROT": "secret-value", "DYNWIRE_CODEX": "x", "DYN_LOG": "debug", "DYN_NAMESPACE": "n", "PATH": "/"})
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    first, second = (record.getMessage() for record in caplog.records)
    assert "DYNWIRE_CODEX" in first and "'DYNWIRE_CODEC'" in first
    assert "DYN_TCP_RPC_PROT" in second and "'DYN_TCP_RPC_PORT'" in second and "secret-value" not in caplog.text


def test_known_variables_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    load({env: text for env, _, _, text, _ in TABLE})
    assert not caplog.records


# TOML file ------------------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / "p.toml"
    path.write_text(text)
    return {"DYNWIRE_CONFIG": str(path)}


def test_file_lists_and_typed_values(tmp_path: Path) -> None:
    config = load(write(tmp_path, '[nats]\nservers = ["nats://a:1", "b:2"]\n[http]\nadaptive_window = false\n'))
    assert config.nats.servers == ("nats://a:1", "nats://b:2") and config.http.adaptive_window is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tcp]\nprot = 1\n", r"'tcp\.prot' in .*did you mean 'tcp\.port'"),
        ("request_plane = 'grpc'", "Invalid request plane mode 'grpc'"),
        ("[tcp]\nport = 'x'\n", r"DYN_TCP_RPC_PORT .*file .*p\.toml.* is 'x'"),
        ("[tcp\n", "is not TOML"),
        ("strict = true", "DYNWIRE_STRICT_CONFIG"),
        ("tcp = 5", "unknown setting 'tcp'"),
    ],
)
def test_bad_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DYNWIRE_CONFIG .*none\.toml.*No such file"):
        load({"DYNWIRE_CONFIG": str(tmp_path / "none.toml")})


# NATS, secrets --------------------------------------------------------------------------------------------------------------


def test_the_connection_to_nats() -> None:
    default = load().nats
    assert (default.connect_timeout, default.wait, default.ping_interval, default.port) == (3.0, True, 3.0, "auto")
    assert (default.tls_ca, default.tls_cert, default.tls_key, default.tls_handshake_first) == (None, None, None, False)
    given = load({"DYNWIRE_NATS_CONNECT_TIMEOUT": "1.5", "DYNWIRE_NATS_WAIT": "no", "DYNWIRE_NATS_PORT": "Plain"}).nats
    assert (given.connect_timeout, given.wait, given.port) == (1.5, False, "plain")
    for name, value in (
        ("DYNWIRE_NATS_PORT", "slow"),
        ("DYNWIRE_NATS_PING_INTERVAL", "0"),
        ("DYNWIRE_NATS_CONNECT_TIMEOUT", "inf"),
    ):
        with pytest.raises(ConfigError, match=name):
            load({name: value})


def test_first_complete_nats_authentication_wins(caplog: pytest.LogCaptureFixture) -> None:
    everything = {
        "NATS_AUTH_USERNAME": "u",
        "NATS_AUTH_PASSWORD": "p",
        "NATS_AUTH_TOKEN": "t",
        "NATS_AUTH_NKEY": "n",
        "NATS_AUTH_CREDENTIALS_FILE": "/c",
    }
    expected = [("userpass", "p"), ("token", "t"), ("token", "t"), ("nkey", "n"), ("credentials_file", "/c")]
    for name, (kind, value) in zip(list(everything), expected, strict=True):
        auth = load(everything).nats.auth
        assert auth is not None and (auth.kind, auth.value) == (kind, value)
        del everything[name]
    assert load().nats.auth is None
    assert "NATS_AUTH_USERNAME" in caplog.text


def test_secrets_are_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    environ = {
        "DYNWIRE_TOKEN": "s3cret",
        "NATS_AUTH_PASSWORD": "s3cret",
        "NATS_AUTH_TOKEN": "s3cret",
        "NATS_AUTH_NKEY": "s3cret",
        "NATS_SERVER": "nats://user:s3cret@h:1,s3cret@h2",
        "ETCD_ENDPOINTS": "http://user:s3cret@h:1",
    }
    config = load(environ)
    assert config.token == "s3cret" and config.nats.servers[0] == "nats://user:s3cret@h:1"
    assert "s3cret" not in repr(config) + json.dumps(describe(config)) + repr(config.nats.auth) + caplog.text
    assert "h:1" in repr(config)
    for bad in ("nats://user:s3cret@h:x", "nats://user:s3/cret@h:1", "ftp://s3cret@h", "nats://h:1,ftp://u:s3cret@h"):
        with pytest.raises(ConfigError) as caught:
            load({"NATS_SERVER": bad})
        assert "s3" not in str(caught.value) + repr(caught.value.__dict__)
    with pytest.raises(ConfigError) as caught:
        load(token=["s3cret"])
    assert "s3cret" not in str(caught.value) + repr(caught.value.__dict__)


def test_mask_url() -> None:
    assert mask_url("nats://h:1") == "nats://h:1"
    assert mask_url("nats://u:p@h:1/x") == "nats://********@h:1/x"


# Hosts ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "[::]", "*", "", "0", "0.0", "::0", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0", "0x0"]
)
def test_wildcards(host: str) -> None:
    assert is_wildcard(host)
    assert not is_wildcard(advertised_host(host))
    with pytest.raises(ConfigError, match="wildcard"):
        advertised_host("127.0.0.1", host)


def test_advertised_host() -> None:
    assert advertised_host("127.0.0.1", None) == "127.0.0.1"
    assert advertised_host("0.0.0.0", "worker-1.example") == "worker-1.example"
    assert advertised_host(None) == detect_host()


def test_listen_hosts() -> None:
    assert load().listen_hosts("tcp") == ("127.0.0.1", "127.0.0.1")
    assert load(discovery="etcd").listen_hosts("http") == (detect_host(), detect_host())
    assert load(tcp_host="0.0.0.0").listen_hosts("tcp") == ("0.0.0.0", detect_host())
    assert load(tcp_advertise_host="name").listen_hosts("tcp") == ("0.0.0.0", "name")
    assert load(tcp_host="::1", tcp_advertise_host="name").listen_hosts("tcp") == ("::1", "name")


def test_no_network_means_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    class NoNetwork(socket.socket):
        def connect(self, address: object) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", NoNetwork)
    assert detect_host() == "127.0.0.1"


# The object -----------------------------------------------------------------------------------------------------------------


def test_frozen_picklable_and_equal() -> None:
    config = load({"DYN_TCP_RPC_PORT": "5"})
    with pytest.raises(AttributeError):
        config.codec = "json"  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(config))
    assert again == config and again.origins == config.origins and hash(again) == hash(config)


def test_describe_covers_every_setting() -> None:
    rows = describe(load({"DYN_TCP_RPC_PORT": "5"}))
    assert [row.name for row in rows] == [s.name for s in settings()]
    assert len({row.env for row in rows}) == len(rows) and all(row.doc for row in rows)
    (row,) = [row for row in rows if row.name == "tcp.port"]
    assert (row.value, row.origin, row.env, row.default) == (5, "env DYN_TCP_RPC_PORT", "DYN_TCP_RPC_PORT", 0)
    json.dumps(rows)


def test_nothing_else_in_the_package_reads_the_environment() -> None:
    package = Path(__file__).parent.parent / "dynwire"
    readers = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "config.py" and any(word in path.read_text() for word in ("os.environ", "getenv", "import environ"))
    ]
    # command-line tools pass an environment on to the processes they start; they take no settings from it
    assert [path for path in readers if not path.startswith(("cli/", "testing/"))] == []


def test_import_reads_no_environment() -> None:
    code = "import dynwire.config, os; os.environ['DYN_TCP_RPC_PORT'] = '77'; print(dynwire.config.load_config().tcp.port)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "DYN_TCP_RPC_PORT": "bad"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "77"


def test_a_child_process_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_TCP_POOL_SIZE", "3")
    monkeypatch.setenv("UNRELATED", "x")
    config = load_config({"nats_servers": ["nats://a:1", "nats://b:2"]}, cli={"request_plane": "http", "http.port": 0})
    found = child_environment(config, {"DYN_TCP_RPC_PORT": "7", "DYN_HTTP_RPC_PORT": "9"})
    assert found["UNRELATED"] == "x" and found["DYN_TCP_RPC_PORT"] == "7"
    there = load_config(environ={name: value for name, value in found.items() if name.startswith(("DYN", "NATS"))})
    assert (there.tcp.pool_size, there.nats.servers, there.request_plane) == (3, ("nats://a:1", "nats://b:2"), "http")
    assert there.http.port == 9 and there.tcp.connect_timeout == config.tcp.connect_timeout
