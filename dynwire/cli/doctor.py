"""``dynwire doctor``: what works here, what does not, and what to do about it."""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.metadata
import importlib.util
import logging
import platform
import re
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from ..config import Config, load_config, mask_url, settings
from ..errors import ConfigError, DynwireError
from ..types import Instance
from . import tables
from ._common import Command, json_option, loop_factory, run_async, settings_options, to_json

MIB = 1 << 20
ROUND_TRIPS = 21

EXTRAS = {
    "speed": ("a faster event loop", ()),
    "http": ("the http plane", ("http",)),
    "nats": ("the nats plane, discovery and events over NATS", ("nats",)),
    "etcd": ("discovery over etcd", ("etcd",)),
    "nats-server": ("a nats-server for development (dynwire nats up)", ()),
}
"""Extra -> what it is for, and what must be chosen for it to be needed"""


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``status``: ok, note (worth knowing), warn (may hurt), fail (does not work)."""

    check: str
    status: str
    text: str
    remedy: str = ""


Findings = Iterator[Finding]


@click.command(name="doctor", cls=Command)
@json_option
@settings_options
def command(as_json: bool, chosen: dict[str, object]) -> None:
    """Check installation, settings, discovery and NATS, and say what to do.

    Looks with the same settings as any other command would: options, DYN_* variables, TOML file. Changes nothing but an absent
    discovery directory, which it makes. Exit code 1 if anything does not work.
    """
    findings: list[Finding] = []
    for finding in _examine(chosen):
        findings.append(finding)
        if not as_json:
            _show(finding)
            sys.stdout.flush()
    failed = sum(finding.status == "fail" for finding in findings)
    if as_json:
        click.echo(to_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
    else:
        warned = sum(finding.status == "warn" for finding in findings)
        trouble = [f"{failed} failed" if failed else "", f"{warned} to look at" if warned else ""]
        click.echo(f"\n{', '.join(filter(None, trouble)) or 'All is well'}.")
    if failed:
        click.get_current_context().exit(1)


def _show(finding: Finding) -> None:
    mark = {"ok": "ok  ", "note": "note", "warn": "WARN", "fail": "FAIL"}[finding.status]
    width = max(40, shutil.get_terminal_size((130, 24)).columns)
    click.echo(click.wrap_text(f"{mark}  {finding.check}: {finding.text}", width, "", " " * 6))
    if finding.remedy:
        click.echo(click.wrap_text(f"-> {finding.remedy}", width, " " * 6, " " * 9))


def _examine(chosen: dict[str, object]) -> Findings:
    yield from _versions()
    yield from _compiled()
    config: Config | None = None
    for found in _settings(chosen):
        if isinstance(found, Config):
            config = found
        else:
            yield found
    if config is None:  # nothing below could be trusted
        return
    yield from _extras(config)
    yield from _plane(config)
    yield from _ports(config)
    yield from _discovery(config)
    yield from _nats(config)


# Installation ----------------------------------------------------------------------------------------------------------------


def _versions() -> Findings:
    import dynwire

    loop = "uvloop" if loop_factory() is not None else "asyncio's own loop (uvloop, of dynwire[speed], is faster)"
    text = f"dynwire {dynwire.__version__} on {platform.python_implementation()} {platform.python_version()}, {loop}"
    try:
        installed = importlib.metadata.version("dynwire")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("version", "ok", f"{text}; run from a source tree that is not installed")
        return
    if installed != dynwire.__version__:
        yield Finding(
            "version",
            "warn",
            f"{text}, but the installed package is {installed}",
            f"another copy is on the path first: {Path(dynwire.__file__).parent}",
        )
    else:
        yield Finding("version", "ok", text)


def _compiled() -> Findings:
    package = Path(importlib.import_module("dynwire").__file__ or "").parent
    names = sorted(path.stem for path in package.glob("_*.pyi"))
    broken = {}
    for name in names:
        try:
            importlib.import_module(f"dynwire.{name}")
        except ImportError as error:
            broken[name] = str(error)
    if broken:
        name, reason = next(iter(broken.items()))
        yield Finding(
            "compiled modules",
            "fail",
            f"{len(broken)} of {len(names)} cannot be imported: {', '.join(broken)} ({name}: {reason})",
            "install dynwire again for this Python (pip install --force-reinstall dynwire), or run make build in a source tree",
        )
    else:
        yield Finding("compiled modules", "ok", f"all {len(names)} load")


def _settings(chosen: dict[str, object]) -> Iterator[Finding | Config]:
    """Findings, and the settings if they can be used."""
    records: list[logging.LogRecord] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Collect()
    logger = logging.getLogger("dynwire.config")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        config = load_config(cli=chosen)
    except ConfigError as error:
        yield Finding("settings", "fail", _text(error), f"correct {error.name or 'the setting'}, or unset it")
        return
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    for record in records:
        status = "fail" if record.levelno >= logging.ERROR else "warn"
        remedy = "correct the value; until then the default is used" if status == "fail" else "correct or unset it"
        yield Finding("settings", status, record.getMessage(), remedy)
    origins = [origin for origin in config.origins.values() if origin != "default"]
    kinds = {"env": "environment", "file": "file", "command line": "command line"}
    counts = {text: sum(origin.startswith(start) for origin in origins) for start, text in kinds.items()}
    parts = [f"{count} from the {text}" for text, count in counts.items() if count]
    yield Finding(
        "settings", "ok", f"{len(settings())} settings, {', '.join(parts) or 'all defaults'} (dynwire config show --origin)"
    )
    yield config


def _requirements() -> dict[str, list[tuple[str, str]]]:
    """Extra -> (package, range) as the installed package names them; empty where it is not installed."""
    found: dict[str, list[tuple[str, str]]] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("dynwire") or ():
            match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*);.*\bextra\s*==\s*['\"]([\w-]+)['\"]", line)
            if match:
                found.setdefault(match[3], []).append((match[1], match[2].strip()))
    return found


def _within(version: str, wanted: str) -> bool:
    """Whether a version is in a range of ``>=`` and ``<`` with plain numbers, which is what our extras have."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text)[:3])

    bounds = re.findall(r"(>=|<)\s*([\d.]+)", wanted)
    return all((numbers(version) >= numbers(bound)) == (sign == ">=") for sign, bound in bounds)


def _extras(config: Config) -> Findings:
    requirements = _requirements()
    used = {config.request_plane, config.discovery.backend}
    for extra, (purpose, users) in EXTRAS.items():
        needed = bool(used.intersection(users))
        missing: list[str] = []
        wrong: list[str] = []
        present: list[str] = []
        for package, wanted in requirements.get(extra, ()):
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                missing.append(package)
            else:
                (present if _within(version, wanted) else wrong).append(f"{package} {version}")
        check, install = f"extra {extra}", f"pip install 'dynwire[{extra}]'"
        if missing:
            text = f"{', '.join(missing)} not installed; for {purpose}"
            yield Finding(check, "fail" if needed else "note", text, install if needed else "")
        elif wrong:
            text = f"{', '.join(wrong)} outside of the tested range; for {purpose}"
            yield Finding(check, "warn", text, install)
        elif present:
            yield Finding(check, "ok", f"{', '.join(present)}; for {purpose}")


# What this host gives --------------------------------------------------------------------------------------------------------


def _plane(config: Config) -> Findings:
    from ..manager import load_plane

    try:
        load_plane(config.request_plane)
    except ConfigError as error:
        yield Finding("request plane", "fail", str(error), f"set DYN_REQUEST_PLANE to one of: {_joined(error.allowed)}")
    else:
        origin = config.origins.get("request_plane", "default")
        yield Finding("request plane", "ok", f"{config.request_plane} ({origin})")


def _text(error: DynwireError) -> str:
    return " ".join(str(error).split())


def _joined(allowed: object) -> str:
    return ", ".join(map(str, allowed)) if isinstance(allowed, (list, tuple)) else str(allowed)


def _ports(config: Config) -> Findings:
    wanted: list[tuple[str, str, int, str, str]] = []
    if config.request_plane in ("tcp", "http"):
        plane = config.request_plane
        try:
            host, advertised = config.listen_hosts(plane)
        except ConfigError as error:
            yield Finding("address", "fail", str(error), "set the advertised host to one that callers can connect to")
            return
        port = config.tcp.port if plane == "tcp" else config.http.port
        setting = f"DYN_{plane.upper()}_RPC_PORT"
        wanted.append(("address", host, port, setting, f"; callers are told {advertised}" if advertised != host else ""))
    if config.system.system_port is not None:
        wanted.append(("system port", config.system.system_host, config.system.system_port, "DYN_SYSTEM_PORT", ""))
    for check, host, port, setting, more in wanted:
        place = f"{host}:{port}" if port else f"{host}, any free port"
        problem = _bind_error(host, port)
        if problem is None:
            yield Finding(check, "ok", f"a worker can listen on {place}{more}")
            continue
        if problem.errno == errno.EADDRINUSE:
            remedy = f"stop what listens there, if it is not a worker that should, or set {setting} (0: any free port)"
        else:
            host_setting = "DYNWIRE_SYSTEM_HOST" if check == "system port" else setting.replace("PORT", "HOST")
            remedy = f"set {host_setting} to an address of this host, and {setting} to a port above 1023"
        yield Finding(check, "fail", f"no further worker can listen on {place}: {problem.strerror or problem}", remedy)


def _bind_error(host: str, port: int) -> OSError | None:
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, number) as sock:
            # as servers do: what is left of closed connections does not count
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1)
    except OSError as error:
        return error
    return None


def _discovery(config: Config) -> Findings:
    backend = config.discovery.backend
    if backend == "mem":
        yield Finding(
            "discovery", "note", "mem: only this process sees what it serves", "DYN_DISCOVERY_BACKEND=file for one machine"
        )
        return

    async def look() -> tuple[Instance, ...]:
        from ..discovery import open_discovery

        chosen = config.discovery
        discovery = open_discovery(
            backend, file_dir=chosen.file_dir, ttl=chosen.ttl, nats=config.nats, etcd=chosen.etcd_endpoints
        )
        try:
            await discovery.start()
            return await discovery.list()
        finally:
            await discovery.close()

    try:
        instances = run_async(look())
    except DynwireError as error:
        yield Finding("discovery", "fail", _text(error), _discovery_remedy(error, backend))
        return
    where = {
        "file": f"{config.discovery.file_dir} can be written",
        "nats": "its bucket can be read and written",
        "etcd": f"{', '.join(map(mask_url, config.discovery.etcd_endpoints))} can be read",
    }[backend]
    yield Finding("discovery", "ok", f"{backend}: {where}; {len(instances)} instances are registered")
    yield from _routing(config, instances)


def _routing(config: Config, instances: tuple[Instance, ...]) -> Findings:
    """KV-aware routing, where there is some: who publishes, who routes, and whether they use the same event plane."""
    from ..kv_router.publisher import EVENTS_ENDPOINT  # here: broken modules have to be found, not to end the doctor
    from ..kv_router.sync import LOAD_ENDPOINT

    publishers = [i for i in instances if i.endpoint == EVENTS_ENDPOINT]
    sharing = [i for i in instances if i.endpoint == LOAD_ENDPOINT]
    services = sorted({f"{i.namespace}.{i.component}" for i in instances if i.endpoint == "best_worker"})
    found = [
        f"{len(publishers)} workers publish KV events" if publishers else "",
        f"router services: {', '.join(services)}" if services else "",
        f"{len(sharing)} routers share their load" if sharing else "",
    ]
    if any(found):
        yield Finding("routing", "ok", "; ".join(filter(None, found)))
    planes = sorted({str(i.metadata.get("event_plane")) for i in publishers} - {config.events.plane})
    if planes:
        text = f"there are workers that publish KV events over {', '.join(planes)}, DYN_EVENT_PLANE is {config.events.plane} here"
        yield Finding(
            "event plane", "warn", text, "set DYN_EVENT_PLANE to the same value on both sides: routers hear nothing else"
        )


def _discovery_remedy(error: DynwireError, backend: str) -> str:
    if backend == "file":
        return "set DYN_FILE_KV to a directory that this user may create or write"
    if isinstance(error, ConfigError):
        return f"allowed: {_joined(error.allowed)}" if error.allowed else "see the documentation of the setting"
    if backend == "etcd":
        if error.code in ("unauthenticated", "permission_denied"):
            return "correct the user in ETCD_ENDPOINTS (http://user:password@host:2379), or what it may do in etcd"
        return "start etcd, or set ETCD_ENDPOINTS"
    return "start the server (dynwire nats up, for development), or set NATS_SERVER"


# NATS ------------------------------------------------------------------------------------------------------------------------


def _nats(config: Config) -> Findings:
    needed = [
        text
        for text, used in (
            ("request plane", config.request_plane == "nats"),
            ("discovery", config.discovery.backend == "nats"),
            ("KV events", config.events.plane == "jetstream"),
        )
        if used
    ]
    named = config.origins.get("nats.servers", "default") != "default"
    if not needed and not named:
        yield Finding("nats", "note", "not needed by these settings, and no server is named (NATS_SERVER); not looked at")
        return
    if importlib.util.find_spec("nats") is None:
        yield Finding("nats", "fail" if needed else "note", "nats-py is not installed", "pip install 'dynwire[nats]'")
        return
    try:
        yield from run_async(_ask_nats(config, needed))
    except DynwireError as error:
        yield Finding(
            "nats server",
            "fail" if needed else "warn",
            _text(error),
            "correct the NATS_AUTH_* and DYNWIRE_NATS_TLS_* settings"
            if error.code in ("unauthenticated", "config_error")
            else "start one (dynwire nats up, for development), or set NATS_SERVER",
        )


async def _ask_nats(config: Config, needed: list[str]) -> list[Finding]:
    from ..nats.connection import NatsConnection

    found: list[Finding] = []
    connection = await NatsConnection.acquire(config.nats, purpose="doctor")
    try:
        info = connection.server_info
        cluster = f", cluster {info['cluster']}" if info.get("cluster") else ""
        others = [str(url) for url in info.get("connect_urls") or ()]
        more = f", {len(others)} servers known" if len(others) > 1 else ""
        found.append(Finding("nats server", "ok", f"{connection.url}: nats-server {info.get('version')}{cluster}{more}"))
        found.append(_port_finding(connection, config))
        found.append(_payload_finding(int(info["max_payload"]), connection.max_payload))
        times = []
        for _ in range(ROUND_TRIPS):
            start = time.perf_counter()
            await connection.client.flush(timeout=5)
            times.append(time.perf_counter() - start)
        found.append(Finding("nats round trip", "ok", f"{tables.duration(statistics.median(times))} (median of {ROUND_TRIPS})"))
        found.append(await _jetstream_finding(connection, config, needed))
    finally:
        await connection.release()
    return found


def _port_finding(connection: Any, config: Config) -> Finding:
    name = type(connection.port).__name__
    if name == "FastPort":
        return Finding("nats port", "ok", "fast: messages are parsed in compiled code")
    version = importlib.metadata.version("nats-py")
    if config.nats.port == "plain":
        return Finding("nats port", "note", f"plain, as DYNWIRE_NATS_PORT says: nats-py {version} alone, which is slower")
    return Finding(
        "nats port",
        "warn",
        f"plain: nats-py {version} alone, which is slower",
        "pip install 'nats-py>=2.16,<2.17', and nats:// or tls:// in NATS_SERVER, for the fast one",
    )


def _payload_finding(announced: int, used: int) -> Finding:
    text = f"payloads up to {_size(used)}, headers included"
    if announced > used:
        return Finding("nats max_payload", "ok", f"{text}; the server allows {_size(announced)}, dynwire uses no more than that")
    if used >= 16 * MIB:
        return Finding("nats max_payload", "ok", text)
    default = ", nats-server's default" if announced == MIB else ""
    return Finding(
        "nats max_payload",
        "note",
        f"{text}, as the server announces{default}",
        "enough for most; for up to 16 MiB: max_payload: 16777216 in the server's configuration (dynwire nats up --max-payload "
        "16777216); for more, the tcp plane",
    )


async def _jetstream_finding(connection: Any, config: Config, needed: list[str]) -> Finding:
    import nats.errors
    import nats.js.errors

    users = []
    if "discovery" in needed:
        users.append("discovery (DYN_DISCOVERY_BACKEND=nats)")
    if "request plane" in needed and config.nats.request_mode == "jetstream":
        users.append("durable requests (DYN_NATS_REQUEST_MODE=jetstream)")
    if "KV events" in needed:
        users.append("KV events (DYN_EVENT_PLANE=jetstream)")
    try:
        account = await connection.client.jetstream().account_info()
    except (nats.errors.Error, TimeoutError) as error:
        off = isinstance(error, (nats.js.errors.ServiceUnavailableError, nats.js.errors.NoStreamResponseError))
        text = f"not available ({'it is off' if off else str(error) or type(error).__name__}); "
        if users:
            remedy = "start nats-server with -js (dynwire nats up has it on)"
            return Finding("nats jetstream", "fail", f"{text}needed for {' and '.join(users)}", remedy)
        return Finding("nats jetstream", "note", f"{text}not needed here")
    return Finding("nats jetstream", "ok", f"available: {account.streams} streams, {account.consumers} consumers")


def _size(count: int) -> str:
    return f"{count / MIB:.3g} MiB" if count >= MIB else f"{count} bytes"
