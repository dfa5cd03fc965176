"""``import dynwire`` is cheap and does nothing, and the modules import in one direction."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import dynwire

PACKAGE = Path(dynwire.__file__).parent


def in_fresh_process(program: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_does_nothing() -> None:
    found = in_fresh_process(
        """
import json, os, sys, threading, time
class Spy(type(os.environ)):
    read = []
    def __getitem__(self, key):
        Spy.read.append(key)
        return super().__getitem__(key)
    def __iter__(self):
        Spy.read.append("all")
        return super().__iter__()
before = set(sys.modules)
files = set(os.listdir("/proc/self/fd"))
os.environ.__class__ = Spy
started = time.perf_counter()
import dynwire
seconds = time.perf_counter() - started
print(json.dumps({
    "seconds": seconds,
    "threads": threading.active_count(),
    "modules": sorted(set(sys.modules) - before),
    "environment": [k for k in Spy.read if k == "all" or k.startswith(("DYN", "NATS", "ETCD"))],
    "files": len(set(os.listdir("/proc/self/fd")) - files),
}))
"""
    )
    assert found["threads"] == 1
    assert found["environment"] == []
    assert found["files"] == 0
    heavy = {"uvloop", "click", "h2", "nats", "asyncio", "ssl", "http", "zmq"}
    assert not heavy & {name.split(".")[0] for name in found["modules"]}
    # The promise is 100 ms; measured are 5. A limit in between sees a heavy import, and no busy machine.
    assert found["seconds"] < 0.1


def test_using_a_manager_imports_no_optional_dependency() -> None:
    modules = in_fresh_process(
        """
import json, sys
import dynwire
with dynwire.NetworkManager(request_plane="memory", discovery="mem") as manager:
    manager.endpoint("a.b.c")
print(json.dumps(sorted(sys.modules)))
"""
    )
    assert not {"uvloop", "click", "h2", "nats", "zmq", "dynwire.planes.tcp"} & set(modules)


def test_everything_public_is_there() -> None:
    for name in dynwire.__all__:
        assert getattr(dynwire, name) is not None
        assert name in dir(dynwire)
    documented = {
        "AsyncNetworkManager", "NetworkManager", "get_manager", "get_async_manager", "Context", "current_context", "Payload",
        "Timeouts", "EndpointId", "Instance", "DynwireError", "__version__",
    }  # fmt: skip
    assert documented <= set(dynwire.__all__)
    errors = {cls.__name__ for cls in dynwire.errors.BY_CODE.values()} if hasattr(dynwire, "errors") else set()
    assert errors <= set(dynwire.__all__)
    try:
        dynwire.nonsense  # noqa: B018
    except AttributeError as error:
        assert "nonsense" in str(error)
    else:
        raise AssertionError("an unknown name must be an AttributeError")
