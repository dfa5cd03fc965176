"""The parent of an embedded nats-server: run as ``python -I -S _supervisor.py``, imports nothing but the standard library.

A process of its own, because only somebody who outlives the program that uses the server can remove its directory when that
program is killed. It ends when its standard input does, or when its parent has changed: a fork of the program keeps a copy of
the pipe open, but is nobody's parent here. Whatever ends it, nats-server goes with it (PR_SET_PDEATHSIG, which names the thread
that forks: this process has only one) and the directory is removed.

Standard input has one JSON object per line, each answered by one on standard output with the same ``id``. A new request ends the
wait of the one before, whose sender has lost its patience.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from types import FrameType
from typing import Any

ORPHAN_CHECK_S = 0.5
"""How often the parent is looked at; the end of standard input is seen at once"""
LOG_LINES = 200
MAX_LINE = 65536
STOP_S = 5.0
"""How long nats-server may take for an orderly end when its program is gone: a JetStream directory may have to be written"""
PR_SET_PDEATHSIG = 1


class Gone(Exception):
    """Nobody needs this process any more."""


class Interrupted(Exception):
    """The next request is there."""


class Supervisor:
    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.prctl = ctypes.CDLL(None, use_errno=True).prctl
        self.directory = tempfile.mkdtemp(prefix="dynwire-nats-")
        self.pid: int | None = None
        self.code: int | None = None
        self.lines: deque[str] = deque(maxlen=LOG_LINES)
        self.output = -1
        self.partial = b""
        self.log_file = -1
        self.requests = b""
        self.waiting_for = ""
        self.found = ""
        self.woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    # -- the program's requests

    def serve(self) -> None:
        while True:
            try:
                while b"\n" not in self.requests:
                    self.turn(None)
            except Interrupted:
                pass
            line, _, self.requests = self.requests.partition(b"\n")
            request: dict[str, Any] = json.loads(line)
            number, operation = request.pop("id"), request.pop("op")
            try:
                reply = getattr(self, f"do_{operation}")(**request)
            except Interrupted:
                continue
            except OSError as error:
                reply = {"error": f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"}
            text = json.dumps({"id": number, **reply}) + "\n"
            try:
                sys.stdout.write(text)
                sys.stdout.flush()
            except BrokenPipeError:
                raise Gone from None
            if operation == "exit":
                raise Gone

    def do_start(self, argv: list[str], files: dict[str, str], log_file: str, ready: str, timeout: float) -> dict[str, Any]:
        """Start the server and wait for the line that begins with ``ready``, its end, or ``timeout`` seconds."""
        for name, text in files.items():
            with open(os.path.join(self.directory, name), "w", opener=_private) as file:
                file.write(text)
        if log_file and self.log_file < 0:
            self.log_file = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.lines.clear()
        self.code = None
        self.waiting_for, self.found = ready, ""
        self.spawn([argument.replace("{directory}", self.directory) for argument in argv])
        deadline = time.monotonic() + timeout
        while not self.found and self.pid is not None and time.monotonic() < deadline:
            self.turn(deadline)
        return self.do_state()

    def do_state(self) -> dict[str, Any]:
        return {
            "pid": self.pid,
            "code": self.code,
            "ready": bool(self.found),
            "lines": list(self.lines),
            "directory": self.directory,
        }

    def do_signal(self, number: int) -> dict[str, Any]:
        """Send a signal; SIGSTOP has taken effect when this returns."""
        if self.pid is not None:
            os.kill(self.pid, number)
            if number == signal.SIGSTOP:
                self.reap(os.WUNTRACED)
        return {"pid": self.pid}

    def do_wait(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while self.pid is not None and time.monotonic() < deadline:
            self.turn(deadline)
        return self.do_state()

    def do_stop(self, number: int, timeout: float) -> dict[str, Any]:
        """Send a signal, wait for the end, kill after ``timeout`` seconds."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGCONT)  # a stopped process would never read the other one
            os.kill(self.pid, number)
            if self.do_wait(timeout)["pid"] is not None:
                self.kill()
        return self.do_state()

    def do_wipe(self, directory: str) -> dict[str, Any]:
        """Remove what is in a directory: storage of a server that does not run."""
        for entry in os.scandir(directory.replace("{directory}", self.directory)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        return {}

    def do_exit(self) -> dict[str, Any]:
        self.close()
        return {}

    # -- the server

    def spawn(self, argv: list[str]) -> None:
        self.output, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.output, False)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            status = 127
            try:
                self.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() == me:
                    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
                        signal.signal(number, signal.SIG_DFL)
                    os.dup2(null, 0)
                    os.dup2(write, 1)
                    os.dup2(write, 2)
                    os.execv(argv[0], argv)
            except OSError as error:
                os.write(2, f"cannot run {argv[0]}: {error.strerror}\n".encode())
            finally:
                os._exit(status)
        os.close(write)
        os.close(null)
        self.pid = pid

    def reap(self, options: int) -> None:
        if self.pid is None:
            return
        pid, status = os.waitpid(self.pid, options)
        if pid == 0 or os.WIFSTOPPED(status):
            return
        self.pid = None
        self.code = os.waitstatus_to_exitcode(status)
        self.read_output()
        if self.output >= 0:
            os.close(self.output)
            self.output = -1

    def kill(self) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            self.reap(0)

    def read_output(self) -> None:
        while self.output >= 0:
            try:
                data = os.read(self.output, 65536)
            except BlockingIOError:
                return
            if not data:
                os.close(self.output)
                self.output = -1
                data = b"\n" if self.partial else b""
            elif self.log_file >= 0:
                with contextlib.suppress(OSError):  # a full disk must not end the server
                    os.write(self.log_file, data)
            *lines, self.partial = (self.partial + data).split(b"\n")
            self.partial = self.partial[:MAX_LINE]
            for line in lines:
                text = line.decode(errors="replace")
                self.lines.append(text)
                if self.waiting_for and self.waiting_for in text:
                    self.found = text

    # -- waiting

    def turn(self, deadline: float | None) -> None:
        """Wait for anything to happen and note it. Raises `Gone`, and `Interrupted` when a request has arrived."""
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(self.woken, select.POLLIN)
        if self.output >= 0:
            poll.register(self.output, select.POLLIN)
        left = ORPHAN_CHECK_S if deadline is None else min(ORPHAN_CHECK_S, max(0.0, deadline - time.monotonic()))
        events = dict(poll.poll(left * 1000))
        if os.getppid() != self.parent:
            raise Gone
        if self.output in events:
            self.read_output()
        if self.woken in events:
            with contextlib.suppress(BlockingIOError):
                os.read(self.woken, 4096)
            self.reap(os.WNOHANG)
        if 0 in events:
            data = os.read(0, 65536)
            if not data:
                raise Gone
            self.requests += data
            if b"\n" in self.requests:
                raise Interrupted

    def close(self) -> None:
        """End the server and remove the directory. May be called twice."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGCONT)
            os.kill(self.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            while self.pid is not None and time.monotonic() < deadline:
                # not turn(): nobody is there any more whose requests could matter
                select.select([self.woken, *([self.output] if self.output >= 0 else [])], [], [], ORPHAN_CHECK_S)
                with contextlib.suppress(BlockingIOError):
                    os.read(self.woken, 4096)
                self.read_output()
                self.reap(os.WNOHANG)
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # passwords and tokens are in there


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Gone


def main() -> None:
    parent = int(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _terminate)
    supervisor = Supervisor(parent)
    try:
        supervisor.serve()
    except Gone:
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        supervisor.close()


if __name__ == "__main__":
    main()
