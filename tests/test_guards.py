"""The guards of conftest.py catch what they promise to catch, and let pass what ends by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = (Path(__file__).parent / "conftest.py").read_text()
for name, value in (
    ("SETTLE_S = 2.0", "SETTLE_S = 0.5"),
    ("REPEAT_S = 5.0", "REPEAT_S = 0.5"),
    ("EXIT_GRACE_S = 20.0", "EXIT_GRACE_S = 2.0"),
):  # these tests wait for the guards to give up
    assert name in CONFTEST
    CONFTEST = CONFTEST.replace(name, value)


def run(pytester: pytest.Pytester, source: str) -> pytest.RunResult:
    """Runs tests in a process of their own: what they leak must not reach this one."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=50)


def test_leaks_fail_the_test_and_say_what_leaked(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import asyncio, gc, socket, subprocess, threading
        import pytest

        kept = []

        def test_descriptor():
            kept.append(open("/dev/null"))

        def test_socket():
            sock = socket.create_server(("127.0.0.1", 0))
            kept.append(sock)

        def test_thread():
            threading.Thread(target=threading.Event().wait, args=(30,), name="forgotten", daemon=True).start()

        def test_child():
            kept.append(subprocess.Popen(["sleep", "30"]))

        def test_child_nobody_waited_for():
            kept.append(subprocess.Popen(["true"]))

        def test_task_cancelled_by_asyncio_run():
            async def main():
                kept.append(asyncio.create_task(asyncio.sleep(30), name="cut off"))
            asyncio.run(main())

        def test_task_of_a_closed_loop():
            loop = asyncio.new_event_loop()
            kept.append(loop.create_task(asyncio.sleep(30), name="abandoned"))
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

        def test_task_destroyed():
            async def waits_for_nobody():
                await loop.create_future()
            loop = asyncio.new_event_loop()
            task = loop.create_task(waits_for_nobody(), name="destroyed")
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()
            del task
            gc.collect()

        async def test_task_of_an_async_test():
            kept.append(asyncio.create_task(asyncio.sleep(30), name="async leftover"))

        @pytest.mark.rss(limit_mib=8)
        def test_memory():
            kept.append(bytearray(b"x") * (32 << 20))
        """,
    )
    result.assert_outcomes(passed=11, errors=11)
    for pattern in (
        "descriptor: fd * -> /dev/null",
        "descriptor: fd * AF_INET SOCK_STREAM ('127.0.0.1', *) peer -",
        "thread: forgotten (daemon)*",
        "child process: pid *: sleep 30",
        "child process: pid *: has ended, but nobody has waited for it",
        "task when asyncio.run ended: cut off: *",
        "task: abandoned: *",
        "task: Task was destroyed but it is pending!*",
        "task when asyncio.run ended: async leftover: *",
        "memory: resident size has grown by 3*.* MiB, the limit is 8 MiB",
    ):
        result.stdout.fnmatch_lines([f"*{pattern}"])


def test_what_ends_by_itself_is_no_leak(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import asyncio, os, subprocess, sys, threading, time
        import pytest

        @pytest.fixture(scope="module")
        def process():
            with subprocess.Popen(["sleep", "30"], stdin=subprocess.PIPE) as process:
                yield process
                process.kill()

        def test_fixture_of_a_wider_scope(process):
            assert process.poll() is None

        def test_thread_that_ends():
            threading.Thread(target=time.sleep, args=(0.2,)).start()

        def test_child_that_was_waited_for():
            subprocess.run([sys.executable, "-c", ""], check=True)

        async def test_task_that_ends():
            asyncio.create_task(asyncio.sleep(0.2))

        @pytest.mark.leaks_ok("shows the marker")
        def test_marked():
            os.open("/dev/null", os.O_RDONLY)

        @pytest.mark.rss(limit_mib=8)
        def test_memory_that_was_freed():
            bytearray(b"x") * (32 << 20)
        """,
    )
    result.assert_outcomes(passed=7)


def test_a_failed_test_is_reported_once(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import subprocess, time

        def test_fails():
            stream = open("/dev/null")
            process = subprocess.Popen(["sleep", "30"])
            with open("pid", "w") as file:
                print(process.pid, file=file)
            assert not process
        """,
    )
    result.assert_outcomes(failed=1)
    pid = int((pytester.path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists(), "the child of a failed test still runs"


def test_a_fixture_of_the_session_that_leaks(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest

        @pytest.fixture(scope="session")
        def forgetful():
            return open("/dev/null")

        def test_it(forgetful):
            pass
        """,
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*fixtures of the session left behind:", "*descriptor: fd * -> /dev/null"])


def test_a_hang_fails_with_all_stacks(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import asyncio, threading
        import pytest

        pytestmark = pytest.mark.hard_timeout(0.3)

        def test_blocked_for_ever():
            release = threading.Event()
            thread = threading.Thread(target=release.wait, name="bystander")
            thread.start()
            try:
                threading.Event().wait()
            finally:
                release.set()
                thread.join()

        async def test_waiting_for_ever():
            async def waits_for_nobody():
                await asyncio.get_running_loop().create_future()
            await asyncio.create_task(waits_for_nobody(), name="the waiting one")

        async def test_callback_that_blocks():
            asyncio.get_running_loop().call_soon(threading.Event().wait)
            await asyncio.sleep(10)

        @pytest.mark.hard_timeout(30)  # its tear-down ends the session too
        def test_the_next_one_runs():
            pass
        """,
    )
    result.assert_outcomes(failed=5, passed=1)
    result.stdout.fnmatch_lines(
        ["test took longer than 0.3 s", "*--- thread bystander", "*in test_blocked_for_ever", "*--- task the waiting one: *"]
    )


def test_a_hang_in_compiled_code_ends_the_process(pytester: pytest.Pytester) -> None:
    # a C call that starts again after every signal: pthread_mutex_lock on a mutex that this thread already holds
    result = run(
        pytester,
        """
        import ctypes
        import pytest

        @pytest.mark.hard_timeout(0.3)
        def test_deaf_to_signals():
            libc = ctypes.CDLL(None)
            mutex = ctypes.create_string_buffer(64)
            assert libc.pthread_mutex_lock(mutex) == 0
            libc.pthread_mutex_lock(mutex)
        """,
    )
    assert result.ret != 0
    result.stderr.fnmatch_lines(["*Timeout*", "*in test_deaf_to_signals"])


def test_settings_of_the_shell_do_not_reach_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"DYN_REQUEST_PLANE", "DYNWIRE_CONFIG", "NATS_SERVER", "ETCD_ENDPOINTS"}
    assert not names & os.environ.keys()
    for name in names:
        monkeypatch.setenv(name, "from the shell")
    run(pytester, f"import os\ndef test_it(): assert not {names!r} & os.environ.keys()").assert_outcomes(passed=1)


def test_children_get_the_discovery_directory(discovery_dir: Path) -> None:
    program = "import os; print(os.environ['DYN_FILE_KV'])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(discovery_dir)
    assert list(discovery_dir.iterdir()) == []


async def test_async_tests_get_their_fixtures(free_port: int, loop_factory: object) -> None:
    assert 0 < free_port < 65536
