"""The stubs and annotations say what is true, as users' type checkers see it."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
STUBS = sorted((ROOT / "dynwire").glob("*.pyi"))


@pytest.mark.hard_timeout(300)
def test_public_api() -> None:
    command = [sys.executable, "-m", "mypy", "tests/typing/public_api.py"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        pytest.fail(done.stdout, pytrace=False)


def parameters_of_stub(path: Path) -> dict[str, list[str]]:
    """Class to the names of its constructor's parameters."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    found[node.name] = [a.arg for a in (*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs)][1:]
    return found


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in STUBS for name in parameters_of_stub(path)],
    ids=lambda value: Path(str(value)).stem,
)
def test_constructors(path: Path, name: str) -> None:
    """stubtest cannot see the parameters of a compiled constructor; Cython writes them into the docstring."""
    doc = getattr(importlib.import_module(f"dynwire.{path.stem}"), name).__doc__ or ""
    match = re.match(rf"{name}\((.*?)\)(?:\n|$)", doc)
    assert match, f"no signature at the start of the docstring of {name}: {doc[:80]!r}"
    shown = [
        re.split(r"[:=]", part)[0].split()[-1]
        for part in re.split(r",\s*(?![^\[(]*[\])])", match[1])
        if part.strip() not in ("", "*", "/")
    ]
    assert parameters_of_stub(path)[name] == shown


def test_lazy_names_agree() -> None:
    """The package names each public object three times: for type checkers, for loading on first use, and in ``__all__``."""
    import dynwire

    tree = ast.parse(Path(dynwire.__file__ or "").read_text())
    typed = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert typed | {"__version__"} == set(dynwire.__all__)
    assert typed <= set(dir(dynwire))
    for name in typed:
        assert getattr(dynwire, name).__module__.startswith("dynwire.")
    with pytest.raises(AttributeError, match="no_such_name"):
        dynwire.no_such_name  # noqa: B018
