"""Whole programs against a real worker: Ctrl-C, fork, multiprocessing, exit with everything open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from .conftest import ROOT, SLACK_S, StartWorker

pytestmark = pytest.mark.parametrize("face", ["async-asyncio"], indirect=True)

HEAD = """
import asyncio, multiprocessing, os, signal, sys, threading, time
import dynwire

def client_of(manager, name):
    client = manager.endpoint("f.w." + name).client()
    client.wait_for_instances(1, timeout=20)
    return client

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""


@pytest.fixture
def program(start_worker: StartWorker, face: str, tmp_path: Path) -> list[str]:
    start_worker()
    return [sys.executable, "-X", "faulthandler", str(tmp_path / "program.py")]


def write(program: list[str], source: str) -> None:
    Path(program[-1]).write_text(HEAD + textwrap.dedent(source))


ENVIRONMENT = {"PYTHONPATH": str(ROOT)}


def run(program: list[str], source: str) -> tuple[list[str], float]:
    """The lines it printed and the seconds it needed after the last one. It must end by itself, silently, with 0."""
    write(program, source)
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            lines = []
            last = time.monotonic()
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                last = time.monotonic()
                if lines[-1] == "end":
                    break
            process.wait(40)
            seconds = time.monotonic() - last
            errors = process.stderr.read()
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, ""), lines
    return lines, seconds


@pytest.mark.parametrize("waiting", ["call", "stream", "follower"])
def test_ctrl_c(program: list[str], waiting: str, face: str) -> None:
    """The main thread is out of its call at once, whoever reads the connection; the manager goes on."""
    write(
        program,
        f"""
        waiting = {waiting!r}
        manager = dynwire.NetworkManager(tcp_pool_size=1)
        echo, wait, some = (client_of(manager, name) for name in ("echo", "wait", "some_then_wait"))
        echo.call(0)
        if waiting == "follower":  # another thread leads the reading
            def lead():
                try:
                    wait.call(0, timeout=60)
                except dynwire.DynwireError:
                    pass
            threading.Thread(target=lead, daemon=True).start()
            time.sleep(0.3)
        for attempt in range(2):
            try:
                if waiting == "stream":
                    with some.stream(1) as stream:
                        assert next(stream) == 0
                        say("waiting")
                        next(stream)
                else:
                    say("waiting")
                    wait.call(0, timeout=60)
            except KeyboardInterrupt:
                say("interrupted", time.monotonic())
            say("works", echo.call(attempt, timeout=10))
        threads = [threading.Thread(target=lambda: say("thread", echo.call(7, timeout=10)))]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        manager.close()
        """,
    )
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            for attempt in range(2):
                assert process.stdout.readline() == "waiting\n"
                asleep(process.pid)
                sent = time.monotonic()  # the same clock in both processes
                process.send_signal(signal.SIGINT)
                word, moment = process.stdout.readline().split()
                assert word == "interrupted"
                assert float(moment) - sent < 0.1 + SLACK_S / 4
                assert process.stdout.readline() == f"works {attempt}\n"
            assert process.stdout.readline() == "thread 7\n"
            process.wait(20)
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert process.returncode == 0


def asleep(pid: int) -> None:
    """Until the main thread sleeps in a system call, a few times in a row."""
    count = 0
    deadline = time.monotonic() + 10
    while count < 20 and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        count = count + 1 if state == "S" else 0
        time.sleep(0.005)
    assert count == 20


def test_ctrl_c_in_asyncio_run(program: list[str], face: str) -> None:
    write(
        program,
        """
        async def main():
            async with dynwire.AsyncNetworkManager() as manager:
                client = await manager.endpoint("f.w.wait").client()
                await client.wait_for_instances(1, timeout=20)
                say("waiting")
                try:
                    await client.call(0, timeout=60)
                except asyncio.CancelledError:
                    say("cancelled")
                    raise
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            say("interrupted")
        """,
    )
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            asleep(process.pid)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (out, err, process.returncode) == ("cancelled\ninterrupted\n", "", 0)


def test_fork_in_a_threaded_program(program: list[str], face: str) -> None:
    lines, _ = run(
        program,
        """
        import warnings
        # Python 3.12 and later say so; that it works here is what this test is about
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        manager = dynwire.NetworkManager()
        client = client_of(manager, "echo")
        stop = threading.Event()
        wrong, seen = [], set()
        def caller(number):
            i = 0
            while not stop.is_set():
                i += 1
                if client.call([number, i], timeout=20) != [number, i]:
                    wrong.append((number, i))
                seen.add(number)
        threads = [threading.Thread(target=caller, args=(n,)) for n in range(4)]
        for thread in threads: thread.start()
        while len(seen) < 4: time.sleep(0.001)  # see test_calls_import_nothing
        for round in range(10):
            pid = os.fork()
            if pid == 0:
                signal.alarm(15)  # a child that hangs ends
                for i in range(50):
                    assert client.call(i, timeout=10) == i
                manager.close()
                os._exit(0)
            say(os.waitpid(pid, 0)[1])
        stop.set()
        for thread in threads: thread.join()
        say(wrong, client.call("parent", timeout=10))
        manager.close()
        """,
    )
    assert lines == ["0"] * 10 + ["[] parent"]


def test_calls_import_nothing(program: list[str], face: str) -> None:
    """What a call imports, a fork can interrupt."""
    lines, _ = run(
        program,
        """
        manager = dynwire.NetworkManager()
        client = client_of(manager, "echo")
        before = set(sys.modules)
        client.call(0, timeout=10)
        say(sorted(set(sys.modules) - before))
        manager.close()
        """,
    )
    assert lines == ["[]"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(program: list[str], method: str, face: str) -> None:
    lines, _ = run(
        program,
        f"""
        def work(number):
            manager = dynwire.get_manager()
            return client_of(manager, "echo").call(number, timeout=20)

        if __name__ == "__main__":
            assert client_of(dynwire.get_manager(), "echo").call(0, timeout=20) == 0
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                say(sorted(pool.map(work, range(6))))
                pool.close()
                pool.join()
            say(client_of(dynwire.get_manager(), "echo").call("parent", timeout=20))
        """,
    )
    assert lines == ["[0, 1, 2, 3, 4, 5]", "parent"]


@pytest.mark.hard_timeout(120)
def test_two_loops_and_four_threads(program: list[str], face: str) -> None:
    """2,000 calls each at once: every reply belongs to its request."""
    lines, _ = run(
        program,
        """
        COUNT = 2000
        blocking, asynchronous = dynwire.NetworkManager(), dynwire.AsyncNetworkManager()
        client = client_of(blocking, "echo")
        wrong, done = [], []

        def thread(number):
            for i in range(COUNT):
                if client.call([number, i], timeout=30) != [number, i]:
                    wrong.append((number, i))
            done.append(number)

        async def loop(number):
            client = await asynchronous.endpoint("f.w.echo").client()
            await client.wait_for_instances(1, timeout=20)
            async def one(k):
                for i in range(COUNT // 20):
                    if await client.call([number, k, i], timeout=30) != [number, k, i]:
                        wrong.append((number, k, i))
            await asyncio.gather(*(one(k) for k in range(20)))
            done.append(number)
            barrier.wait()
            if number == 4:
                await asynchronous.close()
            barrier.wait()

        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=thread, args=(n,)) for n in range(4)]
        threads += [threading.Thread(target=lambda n=n: asyncio.run(loop(n))) for n in (4, 5)]
        for t in threads: t.start()
        for t in threads: t.join()
        say(sorted(done), wrong)
        blocking.close()
        """,
    )
    assert lines == ["[0, 1, 2, 3, 4, 5] []"]


@pytest.mark.parametrize("daemon", [True, False])
def test_exit_with_everything_open(program: list[str], daemon: bool, face: str) -> None:
    lines, seconds = run(
        program,
        f"""
        manager = dynwire.NetworkManager()
        manager.endpoint("f.own.echo").serve(lambda request: request)
        async def forever(request):
            yield 0
            await asyncio.get_running_loop().create_future()
        manager.endpoint("f.own.forever").serve(forever)
        def slow(request):
            time.sleep(100)
        manager.endpoint("f.own.slow").serve(slow)
        own = manager.endpoint("f.own.forever").client()
        own.wait_for_instances(1, timeout=20)
        stream = own.stream(0).__enter__()
        next(stream)
        slow_client = manager.endpoint("f.own.slow").client()
        slow_client.wait_for_instances(1, timeout=20)
        streams = [client_of(manager, "endless").stream(1000).__enter__() for _ in range(10)]
        for other in streams: next(other)
        wait = client_of(manager, "wait")
        def call(client):
            try:
                client.call(0, timeout=1000)
            except dynwire.DynwireError as error:
                pass
        for client in (wait, wait, slow_client):
            threading.Thread(target=call, args=(client,), daemon={daemon}).start()
        time.sleep(0.3)
        if not {daemon}:
            manager.close()  # or the interpreter waits for the threads, as it does for any
        say("end")
        """,
    )
    assert lines == ["end"]
    assert seconds < 5


def test_exit_of_an_async_program_with_everything_open(program: list[str], face: str) -> None:
    lines, seconds = run(
        program,
        """
        kept = []
        async def main():
            manager = dynwire.AsyncNetworkManager()
            async def handler(request):
                yield 0
                await asyncio.get_running_loop().create_future()
            await manager.endpoint("f.own.forever").serve(handler)
            for name in ("f.own.forever", "f.w.endless"):
                client = await manager.endpoint(name).client()
                await client.wait_for_instances(1, timeout=20)
                stream = await client.stream(100).__aenter__()
                await anext(stream)
                kept.append(stream)
            client = await manager.endpoint("f.w.wait").client()
            await client.wait_for_instances(1, timeout=20)
            kept.append(asyncio.ensure_future(client.call(0, timeout=1000)))
            await asyncio.sleep(0.1)
            kept.append(manager)
        asyncio.run(main())
        say("end")
        """,
    )
    assert lines == ["end"]
    assert seconds < 5
