"""Discovery through a directory that the processes of one machine share. Needs no server.

Each registration is one JSON file, written under a temporary name and renamed, so that a reader sees all of it or none. Its
owner touches it every third of the TTL; a record not touched for one TTL is dead. Records of processes on this machine that have
ended (SIGKILL included) are recognised from ``/proc`` and vanish at the next scan, at most `SCAN_INTERVAL_S` later.

Clocks. A record's age is measured with the monotonic clock from the moment its owner was seen to touch it; the file's time is
compared with the wall clock only when a record is seen for the first time, or to learn when within the last scan interval a touch
happened. So a step of the wall clock makes no instance that this reader knows disappear. A reader that starts within a third of
the TTL after a forward step may miss records until they are touched again. A file time in the future counts as just touched.

A record is deleted by its owner, or by a watcher that finds its process gone or has itself seen it untouched for longer than a
heartbeat takes. An owner that was merely suspended writes it again at its next heartbeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import ConfigError, ConnectError, DynwireError, ManagerClosed
from ..types import Instance
from .base import Discovery, Instances, Watch, WatchCallback, check_instance, check_process, ordered, select
from .record import (
    MAX_RECORD_BYTES,
    BadRecord,
    ProcessId,
    Record,
    check_ttl,
    decode_record,
    encode_record,
    record_key,
)

SETTING = "DYN_FILE_KV"
POLL_INTERVAL_S = 0.05
"""How often a watched directory's modification time is read: one ``stat``, about a microsecond."""
SCAN_INTERVAL_S = 1.0
"""How often a watched directory is read without a visible change: heartbeats and dead processes do not change it."""
ORPHAN_S = 60.0
"""Temporary files older than this belong to a process that died between writing and renaming."""
_COARSE_CLOCK_NS = 50_000_000
# File times advance in kernel ticks (4 to 10 ms): a second change in the tick of the first leaves the directory's time as it
# was. So a directory changed this recently is scanned once more, even if its time stays the same.

_NO_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})

log = logging.getLogger("dynwire.discovery")


def _read_start(pid: int | str) -> tuple[str, int] | None:
    """State letter and start time of a process, or None if ``/proc`` does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(4096)
        # The command name stands in parentheses and may contain anything, so count fields after the last one.
        fields = text[text.rindex(b")") + 2 :].split()
        return chr(fields[0][0]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _read_scope() -> tuple[str, ...] | None:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read(64).strip()
        pid_namespace = os.readlink("/proc/self/ns/pid")
    except (OSError, ValueError):
        return None
    try:
        # Start times in /proc are shifted by the reader's time namespace.
        time_namespace = os.readlink("/proc/self/ns/time")
    except OSError:  # before Linux 5.6
        time_namespace = ""
    return (socket.gethostname(), boot, pid_namespace, time_namespace)


def this_process() -> ProcessId | None:
    """The calling process, or None where ``/proc`` does not tell; then only the TTL shows that it ended."""
    scope = _read_scope()
    started = _read_start("self")
    return None if scope is None or started is None else ProcessId(scope, os.getpid(), started[1])


def has_ended(process: ProcessId, scope: tuple[str, ...] | None) -> bool:
    """True if the process certainly runs no more; false if it runs or cannot be judged from ``scope``, the caller's own."""
    if scope is None or process.scope != scope or not 0 < process.pid < 1 << 31:
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it exists and is someone else's
        pass
    seen = _read_start(process.pid)
    if seen is None:  # hidden from us (hidepid), or ended just now: the next scan knows
        return False
    state, start = seen
    if start != process.start:
        return True
    if state not in "ZX":
        return False
    # A zombie: its parent has not collected it yet. A process whose first thread ended looks the same while others run.
    try:
        return len(os.listdir(f"/proc/{process.pid}/task")) <= 1
    except OSError:
        return True


def record_name(instance: Instance) -> str:
    """File name of an instance's record."""
    return f"{record_key(instance)}.json"


class _Seen:
    """What a reader remembers of one file."""

    __slots__ = ("key", "raw", "record", "touched_at", "watched_since")

    def __init__(self, key: tuple[int, int, int], now: float) -> None:
        self.key = key
        """inode, modification time in ns, size: the contents are the same as long as these are"""
        self.watched_since = now
        """monotonic time at which this key was first seen"""
        self.touched_at = now
        """monotonic time of the owner's last touch, as far as we know"""
        self.raw = b""
        self.record: Record | None = None
        """None if the file is not a usable record; it was warned about"""


class FileDiscovery(Discovery):
    """Discovery through the directory ``file_dir``; ``ttl`` in seconds holds for what this object registers.

    ``wall`` and ``monotonic`` are for tests of clock steps.
    """

    def __init__(
        self,
        file_dir: str,
        *,
        ttl: float = 10.0,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        check_ttl(ttl)
        if not file_dir or "\0" in file_dir:
            raise ConfigError(f"{SETTING} is {file_dir!r}; it must name a directory", name=SETTING, value=file_dir)
        self._dir = os.path.abspath(file_dir)
        self._ttl = ttl
        self._wall = wall
        self._monotonic = monotonic
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._process: ProcessId | None = None
        self._closed = False
        self._failing: set[str] = set()  # "read", "write": each is logged once, when it begins and when it ends

        self._own: dict[str, tuple[Instance, bytes]] = {}  # file name to what it holds
        self._heartbeat_handle: asyncio.TimerHandle | None = None

        self._watches: set[Watch] = set()
        self._poll_handle: asyncio.TimerHandle | None = None
        self._dir_key: tuple[int, int, int] | None = None  # as of the last scan; None asks for a scan
        self._scan_due = 0.0
        self._scanned_at = 0.0

        self._seen: dict[str, _Seen] = {}
        self._dir_id: tuple[int, int] | None = None
        self._kept_until: dict[str, float] = {}
        self._snapshot: Instances = ()

    @property
    def healthy(self) -> bool:
        return not self._failing and not self._closed

    async def start(self) -> None:
        """Create the directory if it is missing. Raises `ConfigError` if it cannot be used, `ForkedManager` in a child."""
        self._start()

    async def register(self, instance: Instance) -> None:
        self._start()
        check_instance(instance)
        name = record_name(instance)
        raw, stored = encode_record(Record(instance, self._ttl, self._process), "file")
        try:
            self._write(name, raw)
        except OSError as error:
            raise self._write_error(error) from error
        self._own[name] = (stored, raw)
        self._dir_key = None
        if self._heartbeat_handle is None:
            self._heartbeat_later()

    async def deregister(self, instance: Instance) -> None:
        check_process(self._pid)
        name = record_name(instance)
        if self._own.pop(name, None) is not None:
            self._unlink_own(name)
        if not self._own:
            self._stop_heartbeat()

    def watch(self, path: str | None, callback: WatchCallback) -> Watch:
        loop = self._start()
        watch = Watch(path, callback, loop, self._forget_watch)
        self._watches.add(watch)
        loop.call_soon(self._first, watch)
        if self._poll_handle is None:
            self._poll_handle = loop.call_later(POLL_INTERVAL_S, self._poll)
        return watch

    async def list(self, path: str | None = None) -> Instances:
        self._start()
        self._scan()
        return select(self._snapshot, path)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._pid != os.getpid():  # never started, or in the child of a fork: records and timers are the parent's
            return
        for watch in tuple(self._watches):
            watch.cancel()
        self._stop_heartbeat()
        for name in self._own:
            self._unlink_own(name)
        self._own.clear()
        self._seen.clear()

    # -- the directory

    def _start(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise ManagerClosed("this discovery object is closed")
        if self._loop is None:
            loop = asyncio.get_running_loop()
            _prepare_directory(self._dir)
            self._process = this_process()
            self._pid = os.getpid()
            self._loop = loop
        check_process(self._pid)
        return self._loop

    def _write(self, name: str, raw: bytes) -> None:
        """Write a record atomically. Raises `OSError`, leaving no temporary file behind."""
        try:
            self._write_once(name, raw)
        except FileNotFoundError:  # the directory was deleted under us
            _prepare_directory(self._dir)
            self._write_once(name, raw)

    def _write_once(self, name: str, raw: bytes) -> None:
        # The random part keeps the name free and unpredictable; a fixed length keeps it below NAME_MAX.
        temporary = os.path.join(self._dir, f".{secrets.token_hex(16)}.tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            try:
                done = 0
                while done < len(raw):  # a full disk shows as a short write first
                    done += os.write(fd, raw[done:])
            finally:
                os.close(fd)
            os.rename(temporary, os.path.join(self._dir, name))
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _write_error(self, error: OSError) -> DynwireError:
        reason = os.strerror(error.errno) if error.errno else str(error)
        details: dict[str, Any] = {"path": self._dir, "errno": error.errno}
        if error.errno in _NO_SPACE:
            return ConnectError(
                f"cannot register in {self._dir}: {reason}; free some space or set {SETTING} to another directory",
                phase="register",
                peer=self._dir,
                details=details,
            )
        if error.errno in _NO_RESOURCES:
            return ConnectError(f"cannot register in {self._dir}: {reason}", phase="register", peer=self._dir, details=details)
        return _unusable(self._dir, reason, phase="register", details=details)

    def _unlink_own(self, name: str) -> None:
        try:
            os.unlink(os.path.join(self._dir, name))
        except FileNotFoundError:
            pass
        except OSError as error:  # the record will expire, so this is no reason to fail a shutdown
            log.warning("cannot remove %s from %s (%s); it expires in %g s", name, self._dir, error.strerror, self._ttl)

    # -- heartbeat

    def _heartbeat_later(self) -> None:
        assert self._loop is not None
        self._heartbeat_handle = self._loop.call_later(self._ttl / 3, self._heartbeat)

    def _heartbeat(self) -> None:
        if self._pid != os.getpid():
            return
        # First, so that nothing below can end the heartbeats.
        self._heartbeat_later()
        error: OSError | ConfigError | None = None
        for name, (_, raw) in self._own.items():
            try:
                try:
                    os.utime(os.path.join(self._dir, name), follow_symlinks=False)
                except FileNotFoundError:
                    # Someone took us for dead (we were suspended), or the directory was deleted.
                    self._write(name, raw)
            except (OSError, ConfigError) as failure:
                error = failure
        if error is not None:
            self._lost("write", error)
        else:
            self._recovered("write")

    def _stop_heartbeat(self) -> None:
        if self._heartbeat_handle is not None:
            self._heartbeat_handle.cancel()
            self._heartbeat_handle = None

    # -- watching

    def _poll(self) -> None:
        assert self._loop is not None
        self._poll_handle = None
        if self._pid != os.getpid() or not self._watches:
            return
        self._poll_handle = self._loop.call_later(POLL_INTERVAL_S, self._poll)
        try:
            key = _dir_key(self._dir)
        except OSError as error:
            self._lost("read", error)
            return
        if key != self._dir_key or self._monotonic() >= self._scan_due:
            self._scan()

    def _first(self, watch: Watch) -> None:
        if not watch.cancelled:
            self._scan()
            self._deliver(watch)

    def _deliver(self, watch: Watch) -> None:
        if "read" not in self._failing:
            watch.deliver(self._snapshot)

    def _notify(self) -> None:
        assert self._loop is not None
        for watch in tuple(self._watches):
            # One callback each, so that an exception in one watcher's code does not keep the others from hearing.
            self._loop.call_soon(self._deliver, watch)

    def _forget_watch(self, watch: Watch) -> None:
        self._watches.discard(watch)
        if not self._watches and self._poll_handle is not None:
            self._poll_handle.cancel()
            self._poll_handle = None

    def _lost(self, what: str, error: OSError | ConfigError) -> None:
        """Note that the directory cannot be read or written; the last known set stays."""
        if what not in self._failing:
            self._failing.add(what)
            reason = error.strerror if isinstance(error, OSError) else str(error)
            known = len(self._snapshot)
            log.warning("cannot %s discovery directory %s (%s); keeping %d known instances", what, self._dir, reason, known)

    def _recovered(self, what: str) -> None:
        if what in self._failing:
            self._failing.discard(what)
            log.warning("can %s discovery directory %s again", what, self._dir)

    # -- scanning

    def _scan(self) -> None:
        """Read the directory into ``_snapshot`` and tell the watches; on failure keep the last known set."""
        now = self._monotonic()
        try:
            key = _dir_key(self._dir)  # before reading, so that a change meanwhile leads to another scan
            present = self._read_all(now)
        except OSError as error:
            self._lost("read", error)
            return
        was_lost = "read" in self._failing
        if was_lost or (self._dir_id is not None and self._dir_id != key[:2]):
            self._keep_lost(present, now)
        self._dir_id = key[:2]
        self._recovered("read")
        self._scanned_at = now
        self._scan_due = now + SCAN_INTERVAL_S
        settled = abs(self._wall() * 1e9 - key[2]) > _COARSE_CLOCK_NS
        self._dir_key = key if settled else None
        self._rewrite_lost(present)
        fresh = ordered(self._alive(present, now))
        if fresh != self._snapshot or was_lost:  # watches made meanwhile have heard nothing yet
            self._snapshot = fresh
            self._notify()

    def _read_all(self, now: float) -> set[str]:
        """Bring ``_seen`` up to date with the directory; returns the names of the records in it. Raises `OSError`."""
        present: set[str] = set()
        with os.scandir(self._dir) as entries:
            for entry in entries:
                name = entry.name
                if not name.endswith((".json", ".tmp")):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                    if name.endswith(".tmp"):
                        if name.startswith(".") and self._wall() - status.st_mtime > ORPHAN_S and stat.S_ISREG(status.st_mode):
                            os.unlink(entry.path)
                        continue
                    seen = self._seen.get(name)
                    if seen is None or seen.key != _file_key(status):
                        self._seen[name] = self._read_one(entry.path, name, status, seen, now)
                except FileNotFoundError:  # gone since the directory was read
                    continue
                except PermissionError:  # someone else's file in a sticky directory: not ours to remove or to look at
                    continue
                present.add(name)
        return present

    def _read_one(self, path: str, name: str, status: os.stat_result, before: _Seen | None, now: float) -> _Seen:
        """Read a new or changed file. Raises `OSError` if the directory or this process is in trouble, not the file."""
        seen = _Seen(_file_key(status), now)
        age = max(0.0, self._wall() - status.st_mtime)
        if before is not None:
            age = min(age, now - self._scanned_at)
        seen.touched_at = now - age
        try:
            seen.raw = _read_bytes(path, status)
            if before is not None and before.raw == seen.raw:
                seen.record = before.record
            else:
                seen.record = decode_record(name.removesuffix(".json"), seen.raw)
        except BadRecord as bad:
            if before is None or before.record is not None:
                log.warning("discovery: ignoring %s: %s", path, bad)
        return seen

    def _alive(self, present: set[str], now: float) -> Iterator[Instance]:
        for instance, _ in self._own.values():
            yield instance
        ended: dict[ProcessId, bool] = {}  # several records of one process cost one look at /proc
        for name, seen in tuple(self._seen.items()):
            if name not in present:
                until = self._kept_until.get(name)
                if until is None or now > until:
                    self._kept_until.pop(name, None)
                    del self._seen[name]
                    continue
            else:
                self._kept_until.pop(name, None)
            if seen.record is None or name in self._own:
                continue
            if self._is_dead(name, seen, seen.record, now, ended):
                continue
            yield seen.record.instance

    def _is_dead(self, name: str, seen: _Seen, record: Record, now: float, ended: dict[ProcessId, bool]) -> bool:
        process = record.process
        if process is not None:
            gone = ended.get(process)
            if gone is None:
                gone = ended[process] = has_ended(process, None if self._process is None else self._process.scope)
            if gone:
                self._remove_dead(name, seen)
                return True
        ttl = record.effective_ttl
        if now - seen.touched_at <= ttl:
            return False
        if now - seen.watched_since > ttl / 2:
            self._remove_dead(name, seen)
        return True

    def _remove_dead(self, name: str, seen: _Seen) -> None:
        self._kept_until.pop(name, None)
        path = os.path.join(self._dir, name)
        # Whoever touches it between these two calls finds it missing at its next heartbeat and writes it again.
        with contextlib.suppress(OSError):
            if _file_key(os.lstat(path)) == seen.key:
                os.unlink(path)

    def _keep_lost(self, present: set[str], now: float) -> None:
        """Keep instances whose records went away together with the directory.

        That says nothing about their owners, which write the records again at their next heartbeat: kept for one TTL.
        """
        for name, seen in self._seen.items():
            if name not in present and seen.record is not None:
                self._kept_until[name] = now + seen.record.effective_ttl
                seen.touched_at = now

    def _rewrite_lost(self, present: set[str]) -> None:
        for name, (_, raw) in self._own.items():
            if name not in present:
                try:
                    self._write(name, raw)
                except (OSError, ConfigError) as error:
                    log.debug("cannot write %s again yet: %s", name, error)  # the heartbeat reports it


def _file_key(status: os.stat_result) -> tuple[int, int, int]:
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def _dir_key(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


def _read_bytes(path: str, status: os.stat_result) -> bytes:
    """Contents of a regular file of acceptable size. Raises `BadRecord`, `FileNotFoundError`, or `OSError` (no resources)."""
    if not stat.S_ISREG(status.st_mode):
        raise BadRecord("not a regular file")
    if status.st_size > MAX_RECORD_BYTES:
        raise BadRecord(f"{status.st_size} bytes, more than {MAX_RECORD_BYTES}")
    try:
        # It may have been exchanged since the stat: never follow a link, never wait for the writer of a fifo.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadRecord("not a regular file")
            raw = os.read(fd, MAX_RECORD_BYTES + 1)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _NO_RESOURCES:
            raise
        raise BadRecord(f"cannot be read ({error.strerror})") from error
    if len(raw) > MAX_RECORD_BYTES:
        raise BadRecord(f"more than {MAX_RECORD_BYTES} bytes")
    return raw


def _unusable(path: str, why: str, *, phase: str = "config", details: dict[str, Any] | None = None) -> ConfigError:
    return ConfigError(
        f"{SETTING}: cannot use {path} as discovery directory: {why}",
        name=SETTING,
        value=path,
        allowed="a directory that this process may create, or read and write",
        phase=phase,
        details=details,
    )


def _is_shared_place(path: str) -> bool:
    return bool(os.stat(path).st_mode & stat.S_IWOTH)


def _create_directory(path: str) -> None:
    """Create it and its missing parents; readable by nobody else where everybody may put directories."""
    missing = [path]
    parent = os.path.dirname(path)
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    _check_owners(path, parent)
    _check_owners(path, os.path.realpath(parent))
    temporary = os.path.realpath(tempfile.gettempdir())
    private = _is_shared_place(parent) or os.path.commonpath([temporary, os.path.realpath(parent)]) == temporary
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process of ours was faster
            os.mkdir(directory, 0o700 if private else 0o777)


def _check_owners(path: str, directory: str) -> None:
    """Refuse a place that another user may have prepared: in /tmp anybody can be the first to create a name."""
    while True:
        parent = os.path.dirname(directory)
        owner = os.lstat(directory).st_uid
        if owner not in (0, os.geteuid()) and _is_shared_place(parent):
            raise _unusable(path, f"{directory} belongs to uid {owner} and lies where every user can create it")
        if parent == directory:
            return
        directory = parent


def _prepare_directory(path: str) -> None:
    """Create the directory if it is missing, and raise `ConfigError` unless it is safe and usable."""
    try:
        if not os.path.lexists(path):
            _create_directory(path)
        status = os.stat(path)
        _check_owners(path, path)
        _check_owners(path, os.path.realpath(path))
    except OSError as error:
        raise _unusable(path, error.strerror or str(error), details={"errno": error.errno}) from error
    if not stat.S_ISDIR(status.st_mode):
        raise _unusable(path, "it is not a directory")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise _unusable(path, f"uid {os.geteuid()} may not write to it, or its file system is read-only")
    if status.st_mode & stat.S_IWOTH:
        log.warning("discovery directory %s may be written by every user of this machine: they can add instances", path)
