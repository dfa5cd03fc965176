"""Guards around every test, and fixtures that many tests share.

* A test that leaves a descriptor, thread, pending asyncio task or child process behind fails, with a list of what it left
  (`leak_guard`). What ends by itself a moment later is waited for.
* A test that hangs fails after 60 s with the stacks of all threads and tasks (``@pytest.mark.hard_timeout(seconds)``).
* No test sees the settings of the shell it was started from (`clean_env`).
* ``async def`` tests run on asyncio's loop and on uvloop; fixtures stay plain functions and use `run_async`.

The guards are tested in ``tests/test_guards.py``, which copies this file into a project of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import inspect
import io
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _pytest
import pluggy
import pytest

SETTLE_S = 2.0
"""how long a test's leftovers may take to end by themselves; an executor's thread or a killed worker needs milliseconds"""

HARD_TIMEOUT_S = 60.0
REPEAT_S = 5.0
"""how long cleaning up may take after a hang, before it is interrupted as well"""

EXIT_GRACE_S = 20.0
"""after this much more the process ends: the test did not react to the exception, it is stuck in compiled code"""

SETTINGS = ("DYN_", "DYNWIRE_", "NATS_", "ETCD_")

PROCESS_WIDE_CHILDREN = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")
"""Python starts them once and keeps them until it exits"""


STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "hard_timeout(seconds): fail the test, with all stacks, if its set-up, body or tear-down takes longer (default 60)",
        "rss(limit_mib): fail the test if resident memory has grown by more than this when it ends; be generous",
        "leaks_ok(reason): the test leaves something behind on purpose",
    ):
        config.addinivalue_line("markers", line)
    # registered by its entry point where the package is installed as it is now; not in a source tree beside an older installation
    if not config.pluginmanager.has_plugin("dynwire"):
        config.pluginmanager.register(importlib.import_module("dynwire.testing.pytest_plugin"), "dynwire")
    with contextlib.suppress(ImportError):  # the environment of the vLLM tests has no hypothesis
        hypothesis = importlib.import_module("hypothesis")
        hypothesis.settings.register_profile("dynwire", deadline=None)  # a slow machine is no defect
        hypothesis.settings.load_profile("dynwire")
    config.stash[STDERR] = os.dup(2)  # the real one: pytest captures descriptor 2 while tests run


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STDERR])


# --- leaks --------------------------------------------------------------------------------------------------------------------


def open_descriptors() -> dict[int, str]:
    """Descriptor to what it refers to, ``socket:[inode]`` for example."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor that listed the directory
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def describe_descriptor(fd: int, target: str) -> str:
    """Adds addresses to a socket: an inode number alone helps nobody."""
    if not target.startswith("socket:"):
        return f"fd {fd} -> {target}"
    try:
        sock = socket.socket(fileno=os.dup(fd))
    except OSError as error:  # closed in the meantime, or of a family that Python does not know
        return f"fd {fd} -> {target} ({error})"
    with sock:
        ends = []
        for name in ("getsockname", "getpeername"):
            try:
                ends.append(str(getattr(sock, name)()))
            except OSError:
                ends.append("-")
        return f"fd {fd} -> {target} {sock.family.name} {sock.type.name} {ends[0]} peer {ends[1]}"


def child_processes() -> dict[int, str]:
    """Process id to state and command line of every child, also of those that have ended and were not waited for."""
    pids: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            pids.update(map(int, Path(f"/proc/self/task/{thread}/children").read_text().split()))
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
    found = {}
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(name in command for name in PROCESS_WIDE_CHILDREN):
            continue
        text = command.replace(b"\0", b" ").decode(errors="replace").strip()
        found[pid] = f"pid {pid}: {text}" if state != "Z" else f"pid {pid}: has ended, but nobody has waited for it"
    return found


def pending_tasks() -> set[asyncio.Task[Any]]:
    """Unfinished tasks of all loops. asyncio has public access to one loop's tasks only, its registries have all of them."""
    registries: list[Any] = [
        getattr(asyncio.tasks, name, ()) for name in ("_all_tasks", "_scheduled_tasks", "_eager_tasks")
    ]  # the first up to Python 3.11, the others from 3.12
    found: set[asyncio.Task[Any]] = set()
    for registry in registries:
        for _ in range(100):
            try:
                found.update(list(registry))
                break
            except RuntimeError:  # another thread added a task while we looked
                continue
    return {task for task in found if not task.done()}


def describe_task(task: asyncio.Task[Any]) -> str:
    out = io.StringIO()
    with contextlib.suppress(TypeError):  # the frame of a compiled coroutine has no line number
        task.print_stack(limit=3, file=out)
    return f"{task.get_name()}: {out.getvalue().strip()}"


def resident_kib() -> int:
    """Resident memory, after giving free memory back to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError("no VmRSS in /proc/self/status")


@dataclass
class Snapshot:
    """What the process holds at one moment."""

    descriptors: dict[int, str] = field(default_factory=open_descriptors)
    threads: set[threading.Thread] = field(default_factory=lambda: set(threading.enumerate()))
    tasks: set[asyncio.Task[Any]] = field(default_factory=pending_tasks)
    children: dict[int, str] = field(default_factory=child_processes)

    def add(self, other: Snapshot) -> None:
        """Regard what ``other`` has as known."""
        self.descriptors |= other.descriptors
        self.threads |= other.threads
        self.tasks |= other.tasks
        self.children |= other.children

    def leaks_since(self, before: Snapshot) -> list[str]:
        """One line for each thing that this snapshot has and ``before`` has not."""
        lines = []
        for fd, target in sorted(self.descriptors.items()):
            if before.descriptors.get(fd) != target:
                lines.append(f"descriptor: {describe_descriptor(fd, target)}")
        for thread in self.threads - before.threads:
            lines.append(f"thread: {thread.name}{' (daemon)' if thread.daemon else ''}, {thread!r}")
        for task in self.tasks - before.tasks:
            lines.append(f"task: {describe_task(task)}")
        for pid, text in sorted(self.children.items()):
            if pid not in before.children:
                lines.append(f"child process: {text}")
        return lines


def lives_as_long_as_its_loop(task: asyncio.Task[Any]) -> bool:
    """Of a connection to NATS, which the parts of a loop share: nats-py's tasks, and the one of the port over its public API."""
    code = getattr(task.get_coro(), "cr_code", None)
    return task.get_name() == "dynwire-nats-port" or (code is not None and "/nats/aio/" in code.co_filename)


class TaskWatch(logging.Handler):
    """Finds tasks that are gone by the time the test ends.

    ``asyncio.run`` cancels what its coroutine left behind, and a task that nobody refers to is destroyed with nothing but a
    log record. Neither is an end that a program should rely on.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []
        self._cancel_all: Callable[[asyncio.AbstractEventLoop], None] = asyncio.runners._cancel_all_tasks  # type: ignore[attr-defined]

    def emit(self, record: logging.LogRecord) -> None:
        if "Task was destroyed but it is pending" in record.getMessage():
            self.found.append(f"task: {record.getMessage()}")

    def cancel_all(self, loop: asyncio.AbstractEventLoop) -> None:
        deadline = time.monotonic() + SETTLE_S
        while (left := {t for t in asyncio.all_tasks(loop) if not lives_as_long_as_its_loop(t)}) and time.monotonic() < deadline:
            loop.run_until_complete(asyncio.sleep(0.001))
        self.found += [f"task when asyncio.run ended: {describe_task(task)}" for task in left]
        self._cancel_all(loop)

    def __enter__(self) -> TaskWatch:
        asyncio.runners._cancel_all_tasks = self.cancel_all  # type: ignore[attr-defined]
        logging.getLogger("asyncio").addHandler(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.runners._cancel_all_tasks = self._cancel_all  # type: ignore[attr-defined]
        logging.getLogger("asyncio").removeHandler(self)


def settled_leaks(before: Snapshot) -> list[str]:
    """Leaks that are still there after waiting for what ends by itself."""
    if not Snapshot().leaks_since(before):
        return []
    # A task of a loop that does not run will never end; judged before the collection, which would make it vanish unseen.
    stuck = [f"task: {describe_task(task)}" for task in pending_tasks() - before.tasks if not task.get_loop().is_running()]
    gc.collect()
    deadline = time.monotonic() + SETTLE_S
    while (leaks := Snapshot().leaks_since(before)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return stuck + [line for line in leaks if line not in stuck]


def end_children(before: Snapshot) -> None:
    """Children that a test left must not disturb the tests after it."""
    for pid in child_processes().keys() - before.children.keys():
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


REPORTS = pytest.StashKey[dict[str, pytest.TestReport]]()
BEFORE = pytest.StashKey[Snapshot]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash.setdefault(REPORTS, {})[report.when] = report
    return report


@pytest.fixture(scope="session", autouse=True)
def process_wide_state(request: pytest.FixtureRequest) -> Iterator[Snapshot]:
    """Starts what lives once per process, before anybody counts; and counts what the whole session leaves."""
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.new_event_loop().close()  # libuv opens a pipe for signals with its first loop and keeps it
    before = Snapshot()
    yield before
    leaks = settled_leaks(before)
    end_children(before)
    if leaks and not request.session.testsfailed:  # otherwise it was reported with a test, or a traceback keeps it
        pytest.fail("fixtures of the session left behind:\n  " + "\n  ".join(leaks), pytrace=False)


@pytest.fixture(autouse=True)
def leak_guard(request: pytest.FixtureRequest, process_wide_state: Snapshot) -> Iterator[None]:
    """Fails a test that leaves descriptors, threads, tasks, children or (marker ``rss``) memory behind."""
    node: pytest.Item = request.node
    rss = node.get_closest_marker("rss")
    rss_before = resident_kib() if rss else 0
    before = node.stash[BEFORE] = Snapshot()
    with TaskWatch() as watch:
        yield
    del node.stash[BEFORE]  # it refers to tasks, which would live until the session ends
    reports = node.stash.get(REPORTS, {})
    if node.get_closest_marker("leaks_ok"):
        process_wide_state.add(Snapshot())
        return
    if any(report.failed for report in reports.values()):
        # The traceback of a failed test keeps its frames and all they refer to alive: nothing to learn here.
        end_children(before)
        return
    leaks = watch.found + settled_leaks(before)
    if rss:
        limit_mib = float(rss.kwargs.get("limit_mib", rss.args[0] if rss.args else 0))
        grown_mib = (resident_kib() - rss_before) / 1024
        if grown_mib > limit_mib:
            leaks.append(f"memory: resident size has grown by {grown_mib:.1f} MiB, the limit is {limit_mib:g} MiB")
    if leaks:
        end_children(before)
        pytest.fail("left behind by this test:\n  " + "\n  ".join(leaks), pytrace=False)


# --- hangs --------------------------------------------------------------------------------------------------------------------


class HardTimeout(KeyboardInterrupt):
    """A kind of KeyboardInterrupt, because event loops report any other exception of a callback and go on."""


RUNNER = (*(str(Path(module.__file__ or "").parent) for module in (_pytest, pluggy, pytest)), "<frozen runpy>", __file__)
"""their frames are left out of stacks"""


def all_stacks() -> str:
    """Stacks of all threads and of all unfinished asyncio tasks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        stack = [f for f in traceback.extract_stack(frame) if not f.filename.startswith(RUNNER)]
        parts.append(f"--- thread {names.get(ident, ident)}\n{''.join(traceback.format_list(stack))}")
    parts += [f"--- task {describe_task(task)}\n" for task in pending_tasks()]
    return "".join(parts)


@contextlib.contextmanager
def hard_timeout(item: pytest.Item, phase: str) -> Iterator[None]:
    marker = item.get_closest_marker("hard_timeout")
    limit = float(marker.args[0]) if marker else HARD_TIMEOUT_S
    stacks = ""
    hung = False

    def on_alarm(signum: int, frame: types.FrameType | None) -> None:
        nonlocal stacks
        stacks = stacks or all_stacks()
        raise HardTimeout

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, limit, REPEAT_S)
    faulthandler.dump_traceback_later(limit + EXIT_GRACE_S, exit=True, file=item.config.stash[STDERR])
    try:
        yield
    except HardTimeout:
        hung = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, previous)
    if hung:
        raise pytest.fail.Exception(f"{phase} took longer than {limit:g} s\n{stacks}", pytrace=False) from None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with hard_timeout(item, "set-up"):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with hard_timeout(item, "test"):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with hard_timeout(item, "tear-down"):
        yield


# --- shared fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_env(leak_guard: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the developer's shell do not reach the test, and the test's do not reach the next one."""
    for name in list(os.environ):
        if name.startswith(SETTINGS):
            monkeypatch.delenv(name)


@pytest.fixture
def free_port() -> int:
    """A tcp port of 127.0.0.1 that was free a moment ago. Prefer port 0 and asking for the address where that is possible."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def discovery_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for file discovery, also the default (DYN_FILE_KV) of this process and of its children."""
    path = tmp_path / "discovery"
    path.mkdir()
    monkeypatch.setenv("DYN_FILE_KV", str(path))
    return path


@pytest.fixture(scope="session")
def nats_server(request: pytest.FixtureRequest) -> Any:
    """The plugin's, which may be asked for in the middle of a test (by parameters): no leak of that test then."""
    before = Snapshot()
    server = request.getfixturevalue("nats_server")
    after = Snapshot()
    for item in request.session.items:
        if BEFORE in item.stash and not item.stash.get(REPORTS, {}).get("teardown"):
            known = item.stash[BEFORE]
            known.descriptors |= {fd: name for fd, name in after.descriptors.items() if before.descriptors.get(fd) != name}
            known.children |= {pid: text for pid, text in after.children.items() if pid not in before.children}
    return server


LoopFactory = Callable[[], asyncio.AbstractEventLoop]
RunAsync = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_factory(request: pytest.FixtureRequest, leak_guard: None) -> LoopFactory:
    """Makes event loops: the test runs once with asyncio's and once with uvloop's.

    ``@pytest.mark.parametrize("loop_factory", ["asyncio"], indirect=True)`` limits it to one.
    """
    if request.param == "asyncio":
        return asyncio.new_event_loop
    uvloop: Any = pytest.importorskip("uvloop")
    factory: LoopFactory = uvloop.new_event_loop
    return factory


@pytest.fixture
def run_async(loop_factory: LoopFactory) -> RunAsync:
    """``run_async(coroutine)`` runs it on a new loop of the current kind and returns its result."""

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(coroutine)

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: Any) -> None:
    """Tests that are coroutine functions get `run_async`, and so both loops."""
    if (
        inspect.iscoroutinefunction(obj)
        and isinstance(collector, pytest.Module | pytest.Class)
        and collector.funcnamefilter(name)
    ):
        pytest.mark.usefixtures("run_async")(obj)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names if name in pyfuncitem.funcargs}
    run_async: Any = pyfuncitem.funcargs["run_async"]
    run_async(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def jetstream_server() -> Iterator[Any]:
    """A `dynwire.nats.server.NatsServer` with JetStream for one test, which may kill it, fill its storage or take it away."""
    from dynwire.errors import ConfigError
    from dynwire.nats.server import NatsServer, find_binary

    try:
        binary = find_binary()
    except ConfigError as error:
        pytest.skip(str(error))
    with NatsServer(jetstream=True, binary=binary, monitor=False) as found:
        yield found
