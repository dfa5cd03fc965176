"""What needs a process of its own: fork, Ctrl-C, interpreter exit with everything open."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .conftest import available_planes

HEAD = """
import asyncio, os, signal, sys, threading, time
import dynwire

plane, directory = sys.argv[1:]
settings = {"request_plane": plane, "tcp_host": "127.0.0.1", "http_port": 0, "discovery_file_dir": directory}

def echo(request):
    return request

async def async_echo(request):
    return request

async def forever(request):
    yield 0
    await asyncio.get_running_loop().create_future()
"""


@pytest.fixture(params=available_planes())
def plane(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def program(plane: str, discovery_dir: Path, tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line; the test writes the program itself with `write`."""
    monkeypatch.setenv("NATS_SERVER", nats_url)
    # Python 3.12 warns of fork() in a process with threads, which is what some of these programs are about.
    warnings = ["-W", "ignore::DeprecationWarning"]
    return [sys.executable, "-X", "faulthandler", *warnings, str(tmp_path / "program.py"), plane, str(discovery_dir)]


def write(program: list[str], source: str) -> None:
    Path(program[-3]).write_text(HEAD + textwrap.dedent(source))


def run(program: list[str], source: str, returncode: int = 0) -> list[str]:
    """The lines it printed. It must end by itself, with this code and with nothing on standard error."""
    write(program, source)
    done = subprocess.run(program, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == returncode, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_exit_with_everything_open_blocking(program: list[str]) -> None:
    lines = run(
        program,
        """
        manager = dynwire.NetworkManager(**settings)
        manager.endpoint("a.b.echo").serve(echo)
        manager.endpoint("a.b.forever").serve(forever)
        client = manager.endpoint("a.b.echo").client()
        client.wait_for_instances(1, timeout=20)
        print(client.call({"a": 1}))
        streams = manager.endpoint("a.b.forever").client()
        streams.wait_for_instances(1, timeout=20)
        stream = streams.stream(1).__enter__()
        print(next(stream))
        def blocked():
            try:
                next(stream)
            except dynwire.DynwireError:
                pass
        threading.Thread(target=blocked, daemon=True).start()
        global_manager = dynwire.get_manager
        print("end", flush=True)
        """,
    )
    assert lines == ["{'a': 1}", "0", "end"]
    assert not list(Path(program[-1]).glob("*.json")), "its records stayed in discovery"


def test_exit_with_everything_open_async(program: list[str]) -> None:
    lines = run(
        program,
        """
        kept = []
        async def main():
            manager = dynwire.AsyncNetworkManager(**settings)
            await manager.endpoint("a.b.echo").serve(async_echo)
            await manager.endpoint("a.b.forever").serve(forever)
            client = await manager.endpoint("a.b.echo").client()
            await client.wait_for_instances(1, timeout=20)
            print(await client.call({"a": 1}))
            streams = await manager.endpoint("a.b.forever").client()
            await streams.wait_for_instances(1, timeout=20)
            stream = await streams.stream(1).__aenter__()
            print(await anext(stream))
            kept.extend((manager, client, stream))
        asyncio.run(main())
        print("end")
        """,
    )
    assert lines == ["{'a': 1}", "0", "end"]


def test_fork_with_a_live_manager(program: list[str], plane: str) -> None:
    lines = run(
        program,
        """
        manager = dynwire.NetworkManager(**settings)
        service = manager.endpoint("a.b.echo").serve(echo)
        client = manager.endpoint("a.b.echo").client()
        client.wait_for_instances(1, timeout=20)
        print("parent before", client.call(1, timeout=20), flush=True)
        pid = os.fork()
        if pid == 0:
            print("child service", end=" ")
            try:
                service.drain(0)
            except dynwire.ForkedManager:
                print("refused", flush=True)
            service.close()
            if plane == "memory":  # the server is the parent's, and nobody serves in this process
                try:
                    client.call(1, timeout=5)
                except dynwire.ConnectError:
                    print("child cannot reach the parent", flush=True)
            else:
                print("child", client.call(2, timeout=20), flush=True)
            own = manager.endpoint("a.b.child").serve(echo)
            mine = manager.endpoint("a.b.child").client()
            mine.wait_for_instances(1, timeout=20)
            print("child serves", mine.call(3, timeout=20), flush=True)
            manager.close()
            print("child closed", flush=True)
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        print("parent after", client.call(4, timeout=20), len(manager.list_instances("a.b.echo")), flush=True)
        manager.close()
        """,
    )
    child = ["child cannot reach the parent"] if plane == "memory" else ["child 2"]
    assert lines == [
        "parent before 1",
        "child service refused",
        *child,
        "child serves 3",
        "child closed",
        "parent after 4 1",
    ]


def test_fork_of_an_async_manager(program: list[str]) -> None:
    lines = run(
        program,
        """
        async def main():
            async with dynwire.AsyncNetworkManager(**settings) as manager:
                service = await manager.endpoint("a.b.echo").serve(async_echo)
                client = await manager.endpoint("a.b.echo").client()
                await client.wait_for_instances(1, timeout=20)
                pid = os.fork()
                if pid == 0:
                    in_child(manager, service, client)
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0
                print("parent", await client.call(1, timeout=20), flush=True)

        def in_child(manager, service, client):
            async def uses(what):
                try:
                    await what()
                except dynwire.ForkedManager:
                    print("refused", flush=True)
            def work():  # the forking thread's loop is the parent's
                for what in (lambda: client.call(1), service.drain, manager.list_instances):
                    asyncio.run(uses(what))
                asyncio.run(service.close())
                asyncio.run(manager.close())
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

        asyncio.run(main())
        """,
    )
    assert lines == ["refused", "refused", "refused", "parent 1"]


def test_the_global_managers(program: list[str]) -> None:
    lines = run(
        program,
        """
        os.environ["DYN_FILE_KV"] = directory
        found = set()
        threads = [threading.Thread(target=lambda: found.add(id(dynwire.get_manager()))) for _ in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        print(len(found))
        one, other = dynwire.get_manager(), dynwire.get_async_manager()
        print(one is dynwire.get_manager(), other is dynwire.get_async_manager())
        pid = os.fork()
        if pid == 0:
            print(one is dynwire.get_manager(), other is dynwire.get_async_manager(), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        one.close()
        print(one is dynwire.get_manager())
        """,
    )
    assert lines == ["1", "True True", "True False", "False"]


@pytest.mark.parametrize("waiting", ["call", "stream"])
def test_ctrl_c_in_a_blocking_wait(program: list[str], waiting: str) -> None:
    write(
        program,
        """
        killed = threading.Event()

        def block(request, context):
            print("started", flush=True)
            context.wait_stopped(30)
            if context.is_killed():
                killed.set()
            yield 1

        manager = dynwire.NetworkManager(**settings)
        manager.endpoint("a.b.block").serve(block)
        manager.endpoint("a.b.echo").serve(echo)
        client = manager.endpoint("a.b.block").client()
        client.wait_for_instances(1, timeout=20)
        try:
            if WAITING == "call":
                client.call(1)
            else:
                with client.stream(1) as stream:
                    next(stream)
        except KeyboardInterrupt:
            print("interrupted", killed.wait(20), flush=True)
        other = manager.endpoint("a.b.echo").client()
        other.wait_for_instances(1, timeout=20)
        print("still works", other.call(1, timeout=20), flush=True)
        manager.close()
        """.replace("WAITING", repr(waiting)),
    )
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=50)
        finally:
            process.kill()
    assert out == "interrupted True\nstill works 1\n"
    assert err == ""
    assert process.returncode == 0
