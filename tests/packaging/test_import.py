"""What importing dynwire and its public names does not do. How long it takes is measured in benchmarks/, not here."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

SPY = """
import json, os, sys, threading

reads = []


class Spy(dict):
    # asks of the environment and who asked; every way to look inside is covered, os.getenv goes through os.environ as well
    def note(self, what):
        frame = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__") in ("os", "_collections_abc", __name__):
            frame = frame.f_back
        reads.append([str(what), frame.f_globals.get("__name__", "?") if frame is not None else "?"])

    def __getitem__(self, name):
        self.note(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.note(name)
        return super().get(name, default)

    def __contains__(self, name):
        self.note(name)
        return super().__contains__(name)

    def __iter__(self):
        self.note("everything")
        return super().__iter__()

    def keys(self):
        self.note("everything")
        return super().keys()

    def items(self):
        self.note("everything")
        return super().items()

    def copy(self):
        self.note("everything")
        return super().copy()


os.environ = Spy(os.environ)
before = set(sys.modules)
descriptors = set(os.listdir("/proc/self/fd"))
started = []
start = threading.Thread.start
threading.Thread.start = lambda self: (started.append(self.name), start(self))[1]

import dynwire

at_import = sorted(set(sys.modules) - before)
missing = [name for name in dynwire.__all__ if getattr(dynwire, name, None) is None]  # loads what is loaded on first use
json.dump(
    {
        "missing": missing,
        "at_import": at_import,
        "modules": sorted(set(sys.modules) - before),
        "reads": reads,
        "started": started,
        "alive": threading.active_count(),
        "descriptors": sorted(set(os.listdir("/proc/self/fd")) - descriptors),
    },
    sys.stdout,
)
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an interpreter saw while it imported dynwire and then used every public name."""
    program = tmp_path_factory.mktemp("spy") / "spy.py"
    program.write_text(textwrap.dedent(SPY))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, cwd=program.parent, timeout=50)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_reads_no_environment(seen: dict[str, Any]) -> None:
    ours = [read for read in seen["reads"] if read[1].startswith("dynwire") or read[0].startswith(("DYN", "NATS", "ETCD"))]
    assert ours == []


def test_starts_no_thread_and_opens_nothing(seen: dict[str, Any]) -> None:
    assert (seen["started"], seen["alive"], seen["descriptors"]) == ([], 1, [])


HEAVY = {
    "uvloop", "click", "zmq", "nats", "h2", "hpack", "hyperframe", "grpc", "numpy", "etcd3", "prometheus_client", "opentelemetry",
    "http", "urllib.request", "email", "xml", "multiprocessing", "concurrent.futures.process", "unittest", "pydoc", "sqlite3",
    "importlib.metadata", "tomllib", "difflib", "ctypes", "argparse",
}  # fmt: skip
"""optional dependencies, and modules of the standard library that cost more than they would give at import; asyncio brings ssl"""


def test_imports_no_optional_or_heavy_module(seen: dict[str, Any]) -> None:
    found = [name for name in seen["modules"] if any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY)]
    assert found == []


def test_imports_neither_command_line_nor_planes(seen: dict[str, Any]) -> None:
    unwanted = {"cli", "testing", "frontend", "workers", "planes.tcp", "planes.http", "planes.nats", "planes.memory"}
    found = {name.removeprefix("dynwire.") for name in seen["modules"] if name.startswith("dynwire.")}
    assert not {name for name in found for other in unwanted if name == other or name.startswith(f"{other}.")}


def test_every_public_name_resolves(seen: dict[str, Any]) -> None:
    assert seen["missing"] == []


def test_import_alone_is_cheap(seen: dict[str, Any]) -> None:
    """No more than a handful of modules: that keeps it at a few milliseconds on any machine."""
    assert "asyncio" not in seen["at_import"]
    assert len(seen["at_import"]) < 40


def test_every_module_of_the_package_has_typing_information() -> None:
    import dynwire

    package = Path(dynwire.__file__ or "").parent
    assert (package / "py.typed").exists()
    compiled = {path.name.split(".")[0] for path in package.glob("*.so")}
    assert {path.stem for path in package.glob("*.pyi")} == compiled
