"""``import dynwire`` is cheap and does nothing, and the modules import in one direction."""

from __future__ import annotations

import ast
import importlib.util
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


LAYERS = [
    {"errors", "types", "config", "observability"},
    {"_buffers", "_context", "_frames", "_awaitable", "_tcpio", "calls", "codec", "wire"},
    {"streams", "portal", "handlers", "migration"},
    {"planes", "discovery", "routing", "event_plane"},
    {"runtime", "client", "replies", "service", "endpoint", "manager", "kv_router"},
    {"cli", "testing", "workers", "frontend", "mocker", "vllm", "__main__", ""},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def imports_of(file: Path) -> set[tuple[str, bool]]:
    """``(first component below dynwire, whether at module level)`` of all imports that run; those for type checkers do not."""
    parts = ["dynwire", *file.relative_to(PACKAGE).with_suffix("").parts]
    package = parts if file.name == "__init__.py" else parts[:-1]
    if file.name == "__init__.py":
        package = parts[:-1]
    found: set[tuple[str, bool]] = set()

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                base = importlib.util.resolve_name("." * child.level + (child.module or ""), ".".join(package))
                names = [base] if child.module else [f"{base}.{alias.name}" for alias in child.names]
            for name in names:
                if name == "dynwire" or name.startswith("dynwire."):
                    found.add((name.removeprefix("dynwire").removeprefix(".").split(".")[0], top))
            visit(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(file.read_text()), True)
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        own = "" if parts == ("__init__",) else parts[0]
        for name, _ in imports_of(file):
            if name not in LAYER:
                wrong.append(f"{'/'.join(parts)} imports {name}, which is in no layer")
            elif own in LAYER and LAYER[name] > LAYER[own]:
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert wrong == []


def test_only_the_manager_knows_concrete_planes() -> None:
    concrete = {"tcp", "http", "nats", "memory", "portal_faces"}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "planes":
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("planes"):
                named = {*(node.module or "").split(".")[1:], *(alias.name for alias in node.names)} & concrete
                assert not named or parts == ("manager",), f"{'/'.join(parts)} imports {named}"
