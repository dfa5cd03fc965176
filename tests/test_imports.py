"""Imports point one way (STYLE.md), concrete planes are named by the manager only, and only config.py reads the environment.

Python sources are parsed; of Cython sources the ``import``, ``cimport`` and ``cdef extern from`` lines are read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = (
    # leaves; Context is a value type of the API like those of types.py, and may wait, so it knows asyncio and threading
    ("errors", "types", "config", "observability", "_context", "_version"),
    # compiled codecs
    ("_bytes", "_buffers", "_link", "_frames", "_hpack", "_http2", "_http2lib", "_natsproto", "_kvhash"),
    # protocols without I/O; codec turns objects into payloads
    ("wire", "codec", "_httpwire", "_natswire", "_natsqueue", "_kvtree"),
    # what moves bytes and waits, and what every plane needs to run a call
    ("streams", "_awaitable", "_tcpio", "_httpio", "_natsport", "_natsio", "nats", "_portal", "portal", "calls", "handlers"),
    ("planes", "event_plane", "discovery"),
    ("manager", "system", "runtime", "endpoint", "client", "service", "routing", "migration", "replies", "kv_router"),
    ("workers", "frontend", "router", "mocker", "vllm"),
    ("loadgen", "cli", "__main__", "testing"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}

SANS_IO = (*LAYERS[1], "wire", "_httpwire", "_natswire", "_natsqueue", "_kvtree")
"""know no socket, loop, thread, clock or environment; time comes in as an argument"""

IO_MODULES = {
    "socket",
    "asyncio",
    "threading",
    "time",
    "os",
    "ssl",
    "select",
    "selectors",
    "signal",
    "subprocess",
    "uvloop",
    "concurrent",
}
IO_HEADERS = re.compile(r"(sys/(socket|epoll|uio|time|select)|netinet/.*|poll|pthread|time|unistd|errno)\.h")
IO_CIMPORTS = re.compile(r"(posix|libc\.time|libc\.errno|cpython\.(time|pythread))\b")

PLANE_INTERFACES = ("base", "sockets", "serving", "portal_faces")
"""modules of dynwire.planes that are no concrete plane"""

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


@dataclass(frozen=True)
class Import:
    importer: str
    """dotted name of the module that imports, without ``dynwire.``; empty for the package itself"""
    target: str
    """dotted name of what is imported; ours start with ``dynwire``"""
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer or 'dynwire'} line {self.line} imports {self.target}"

    @property
    def ours(self) -> str | None:
        """Target without ``dynwire.``, or None if it is somebody else's."""
        return self.target.partition(".")[2] if self.target.split(".")[0] == "dynwire" else None


def module_name(path: Path) -> str:
    if path.suffix == ".pxi":  # text of the module that includes it
        for host in path.parent.glob("*.pyx"):
            if re.search(rf'^include "{re.escape(path.name)}"', host.read_text(), re.MULTILINE):
                return host.stem
        raise ValueError(f"no .pyx includes {path.name}")
    for base in (ROOT / "dynwire", ROOT / "cython_src" / "dynwire"):
        if path.is_relative_to(base):
            parts = path.relative_to(base).with_suffix("").parts
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise ValueError(path)


def resolve(path: Path, level: int, module: str) -> str:
    """Absolute name of a relative import in the file at ``path``."""
    if level == 0:
        return module
    package = [
        "dynwire",
        *path.relative_to(ROOT / "dynwire" if path.suffix == ".py" else ROOT / "cython_src" / "dynwire").parts[:-1],
    ]
    package = package[: len(package) - level + 1]
    return ".".join([*package, *([module] if module else [])])


def is_module(name: str) -> bool:
    """Whether ``dynwire.a.b`` is a module or package of ours, not a name inside of one."""
    relative = Path(*name.split("."))
    return any(
        candidate.exists()
        for candidate in (
            ROOT / relative.with_suffix(".py"),
            ROOT / relative / "__init__.py",
            ROOT / "cython_src" / relative.with_suffix(".pyx"),
        )
    )


def from_targets(module: str, names: list[str]) -> Iterator[str]:
    """``from package import submodule`` imports the submodule, ``from module import name`` the module."""
    for name in names:
        inner = f"{module}.{name}"
        yield inner if module.split(".")[0] == "dynwire" and is_module(inner) else module


def python_imports(path: Path) -> Iterator[Import]:
    importer = module_name(path)

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(importer, alias.name, child.lineno, in_function)
            elif isinstance(child, ast.ImportFrom):
                module = resolve(path, child.level, child.module or "")
                for target in from_targets(module, [alias.name for alias in child.names]):
                    yield Import(importer, target, child.lineno, in_function)
            else:
                inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), False)


CYTHON_IMPORT = re.compile(r"^(\s*)(?:from\s+(\.*)([\w.]*)\s+(?:c?import)\s+(.+)|(?:c?import)\s+([\w.]+(?:\s*,\s*[\w.]+)*).*)$")


def cython_imports(path: Path) -> Iterator[Import]:
    importer = module_name(path)
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = CYTHON_IMPORT.match(line.partition("#")[0].rstrip())
        if not match:
            continue
        indent, dots, module, names, plain = match.groups()
        if plain:
            targets = [name.strip() for name in plain.split(",")]
        else:
            words = [name.split(" as ")[0].strip(" ()\\") for name in names.split(",")]
            targets = list(from_targets(resolve(path, len(dots), module), [word for word in words if word]))
        for target in targets:
            yield Import(importer, target, number, bool(indent))


def sources() -> list[Path]:
    return [
        *sorted((ROOT / "dynwire").rglob("*.py")),
        *sorted(path for path in (ROOT / "cython_src" / "dynwire").iterdir() if path.suffix in (".pyx", ".pxd", ".pxi")),
    ]


def all_imports() -> list[Import]:
    return [item for path in sources() for item in (python_imports if path.suffix == ".py" else cython_imports)(path)]


def wrong_direction(item: Import) -> str | None:
    """What is wrong with an import, or None."""
    ours = item.ours
    importer = item.importer.split(".")[0]
    if importer in SANS_IO and item.target.split(".")[0] in IO_MODULES:
        return f"{item}: codecs and protocols know no I/O, thread or clock"
    if importer in LAYERS[1] and IO_CIMPORTS.match(item.target):
        return f"{item}: codecs know no I/O, thread or clock"
    if ours is None or not importer:
        return None  # the package's own __init__ re-exports what it likes
    if importer not in LAYER_OF:
        return f"{item.importer}: give this module a layer in {Path(__file__).name}"
    if not ours:
        # the package itself stands above the manager; below, it would be a circle
        return None if LAYER_OF[importer] > LAYER_OF["manager"] else f"{item}: the package imports this module"
    target = ours.split(".")[0]
    if target not in LAYER_OF:
        return None if not is_module(f"dynwire.{target}") else f"{target}: give this module a layer in {Path(__file__).name}"
    if LAYER_OF[importer] < LAYER_OF[target]:
        return f"{item}: {importer} is below {target}"
    if importer != target and LAYER_OF[importer] == 0 and (importer, target) not in {("types", "errors"), ("config", "errors")}:
        return f"{item}: leaves import nothing else of the package but errors"
    if target == "planes" and (plane := concrete_plane(ours)) is not None and plane != concrete_plane(item.importer):
        if importer != "manager":
            return f"{item}: only the manager names concrete planes"
        if not item.in_function:
            return (
                f"{item}: the manager imports a plane inside the function that needs it, so that its dependencies stay optional"
            )
    return None


def concrete_plane(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "planes" or len(parts) == 1 or parts[1] in PLANE_INTERFACES:
        return None
    return parts[1]


def test_imports_point_one_way() -> None:
    problems = sorted({problem for item in all_imports() if (problem := wrong_direction(item))})
    assert not problems, "\n".join(["", *problems])


def test_codecs_include_no_header_for_io() -> None:
    found = [
        f"{path.name} line {number}: {line.strip()}"
        for path in sources()
        if path.suffix != ".py" and module_name(path) in LAYERS[1]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := re.match(r'\s*cdef extern from ["<]([^">]+)', line)) and IO_HEADERS.fullmatch(match[1])
    ]
    assert found == []


def environment_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and isinstance(node.value, ast.Name):
            if node.value.id in ("os", "posix", "_os"):
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "posix"):
            for alias in node.names:
                if alias.name in ENVIRONMENT:
                    yield node.lineno, f"from os import {alias.name}"


def test_only_config_reads_the_environment() -> None:
    found = [
        f"{path.relative_to(ROOT)} line {line}: {use}"
        for path in sources()
        if path.suffix == ".py" and module_name(path) != "config"
        for line, use in environment_uses(ast.parse(path.read_text()))
    ]
    found += [
        f"{path.name} line {number}: {line.strip()}"
        for path in sources()
        if path.suffix != ".py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\b(os\.)?(environb?|getenvb?)\b", line.partition("#")[0])
    ]
    assert found == []


def test_no_pickle_of_what_comes_from_the_network() -> None:
    """Promise P6: nothing received is executed or unpickled; the modules that could are not imported at all."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    assert [str(item) for item in all_imports() if item.target.split(".")[0] in forbidden] == []


# --- the checks themselves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (Import("wire.http2", "asyncio", 1, True), "know no I/O"),
        (Import("_frames", "libc.time", 1, False), "know no I/O"),
        (Import("_context", "asyncio", 1, False), None),
        (Import("types", "dynwire.errors", 1, False), None),
        (Import("types", "dynwire.config", 1, False), "leaves"),
        (Import("_frames", "dynwire._buffers", 1, False), None),
        (Import("_frames", "dynwire._tcpio", 1, False), "below"),
        (Import("planes.tcp.client", "dynwire.wire.envelope", 1, False), None),
        (Import("planes.tcp.client", "dynwire.planes.tcp.server", 1, False), None),
        (Import("planes.tcp.client", "dynwire.planes.http.client", 1, True), "only the manager"),
        (Import("planes.tcp.client", "dynwire.planes.base", 1, False), None),
        (Import("planes", "dynwire.planes.memory", 1, False), "only the manager"),
        (Import("manager", "dynwire.planes.tcp", 1, True), None),
        (Import("manager", "dynwire.planes.tcp", 1, False), "inside the function"),
        (Import("frontend.app", "dynwire.planes.tcp", 1, True), "only the manager"),
        (Import("frontend.app", "dynwire", 1, False), None),
        (Import("client", "dynwire", 1, True), "the package imports this module"),
        (Import("discovery.file", "dynwire.manager", 1, True), "below"),
        (Import("newcomer", "dynwire.errors", 1, False), "give this module a layer"),
        (Import("cli.demo", "dynwire.manager", 1, True), None),
        (Import("", "dynwire.planes.tcp", 1, True), None),
    ],
    ids=str,
)
def test_the_rules(item: Import, expected: str | None) -> None:
    problem = wrong_direction(item)
    assert problem is None if expected is None else problem and expected in problem


def test_reading_cython_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cython_src" / "dynwire"
    folder.mkdir(parents=True)
    path = folder / "_frames.pyx"
    path.write_text(
        "import asyncio, time as t\ncimport cython\nfrom libc.string cimport memcpy  # import os\n"
        "from ._buffers cimport Block\nfrom . import _buffers\n    from .errors import X\ncdef object important = 1\n"
    )
    (folder / "_buffers.pyx").touch()
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert [(item.target, item.line, item.in_function) for item in cython_imports(path)] == [
        ("asyncio", 1, False),
        ("time", 1, False),
        ("cython", 2, False),
        ("libc.string", 3, False),
        ("dynwire._buffers", 4, False),
        ("dynwire._buffers", 5, False),
        ("dynwire.errors", 6, True),
    ]


def test_finding_uses_of_the_environment() -> None:
    source = "import os\nfrom os import environ as e\nx = os.environ['A']\ny = os.getenv('B')\nz = os.getpid()\n"
    assert [line for line, _ in sorted(environment_uses(ast.parse(source)))] == [2, 3, 4]
