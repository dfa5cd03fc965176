"""The linters and type checkers, as tests. ``python tests/test_lint.py [name …]`` (``make lint``) runs them without pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILED = sorted(f"dynwire.{path.stem}" for path in (ROOT / "cython_src" / "dynwire").glob("*.pyx"))

COMMANDS: dict[str, tuple[str, ...]] = {
    "ruff": ("ruff", "check", "--output-format", "concise", "."),
    "format": ("ruff", "format", "--check", "--output-format", "concise", "."),
    "cython-lint": ("cython-lint", "cython_src"),
    "mypy": ("mypy", "--package", "dynwire"),
    "mypy-tests": ("mypy", "tests/conftest.py"),
    "stubtest": ("stubtest", "--ignore-unused-allowlist", "--allowlist", "tests/typing/stubtest_allowlist.txt", *COMPILED),
}


def run(name: str) -> subprocess.CompletedProcess[str]:
    tools = Path(sys.executable).parent
    # cython-lint starts pycodestyle by its bare name
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    program, *arguments = COMMANDS[name]
    if not (tools / program).exists():
        raise FileNotFoundError(f"{program} is missing beside {sys.executable}: pip install -e '.[lint]', or run make lint")
    return subprocess.run(
        [tools / program, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.hard_timeout(300)  # mypy without its cache takes half a minute on a slow machine
@pytest.mark.parametrize("name", COMMANDS)
def test_lint(name: str) -> None:
    done = run(name)
    if done.returncode:
        pytest.fail(f"{' '.join(COMMANDS[name])} ended with {done.returncode}\n{done.stdout}", pytrace=False)


def test_every_compiled_module_has_a_stub() -> None:
    """stubtest reports success for a module without one."""
    assert [name for name in COMPILED if not (ROOT / name.replace(".", "/")).with_suffix(".pyi").exists()] == []


def main(names: list[str]) -> int:
    failed = []
    for name in names or COMMANDS:
        done = run(name)
        print(f"{name}: {'FAILED' if done.returncode else 'ok'}", flush=True)
        if done.returncode:
            print(done.stdout, flush=True)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
