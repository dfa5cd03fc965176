"""Every snippet of README.md and docs/*.md is run.

* ``python``: run as a program; ``await`` at top level is allowed. If its first line is ``# name.py``, it is also saved under
  that name, for the snippets after it in the same document (they share a directory).
* ``console``: lines that start with ``$ `` are run by bash (``> `` continues a line), what follows is the expected output.
  ``...`` stands for any text, or alone on a line for any lines. ``# exit 2`` at the end of a command says how it ends. A command
  that ends in ``&`` runs until the end of the snippet; then other output may stand between the expected lines.
* ``bash`` and ``sh``: run as a script that stops at the first error.
* ``json`` and ``toml``: parsed.

The port of the http plane, 8888, is another one in each run (``DYN_HTTP_RPC_PORT``): somebody else may be using it.

``<!-- no-test: reason -->`` on the line before a snippet leaves it out (a file is saved all the same).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 45.0
NOT_RUN = {"", "text", "c", "cython", "http", "yaml", "diff", "mermaid", "ini"}


@dataclass(frozen=True)
class Snippet:
    document: str
    line: int
    language: str
    text: str
    no_test: str | None = None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}:{self.language}"

    @property
    def file_name(self) -> str | None:
        match = re.match(r"# ([\w/-]+\.py)$", self.text.partition("\n")[0])
        return match[1] if match and self.language == "python" else None


def snippets_of(document: str, text: str) -> Iterator[Snippet]:
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"(\s*)(`{3,}|~{3,})\s*(\S*)", lines[number])
        if not fence:
            number += 1
            continue
        before = next((line.strip() for line in reversed(lines[:number]) if line.strip()), "")
        marker = re.fullmatch(r"<!--\s*no-test:\s*(.+?)\s*-->", before)
        start = number + 1
        end = start
        while end < len(lines) and lines[end].strip() != fence[2]:
            end += 1
        body = "\n".join(line.removeprefix(fence[1]) for line in lines[start:end]) + "\n"
        yield Snippet(document, start, fence[3], body, marker[1] if marker else None)
        number = end + 1


DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if path.exists()]
SNIPPETS = [
    snippet for path in DOCUMENTS for snippet in snippets_of(str(path.relative_to(ROOT)), path.read_text()) if snippet.language
]


# --- running ------------------------------------------------------------------------------------------------------------------


def group_lives(group: int) -> bool:
    """Whether a process of the group runs; one that ended without anybody waiting for it does not count."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, found = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(found) == group and state != "Z":
            return True
    return False


HTTP_PORT = "8888"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(command: list[str], workspace: Path) -> tuple[int, str]:
    """Runs a command in a process group of its own and ends all of that group; returns exit status and output.

    Port 8888 stands for a free one, in the command and in its output.
    """
    port = free_port()
    status, output = run_on([word.replace(HTTP_PORT, port) for word in command], workspace, port)
    return status, output.replace(port, HTTP_PORT)


def run_on(command: list[str], workspace: Path, port: str) -> tuple[int, str]:
    environment = {
        **os.environ,
        "DYN_HTTP_RPC_PORT": port,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DYN_FILE_KV": str(workspace / ".discovery"),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "120",
    }
    log = workspace / ".output"  # not a pipe: a background process would keep it open after the command has ended
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, cwd=workspace, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        ) as process,
    ):
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = -1
        for sig, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            if not group_lives(process.pid):
                break
            os.killpg(process.pid, sig)
            deadline = time.monotonic() + patience_s
            while group_lives(process.pid) and time.monotonic() < deadline:
                time.sleep(0.02)
    output = log.read_text()
    if status == -1:
        pytest.fail(f"still running after {TIMEOUT_S:g} s:\n{output}", pytrace=False)
    return status, output


RUN_PYTHON = """
import ast, asyncio, inspect, sys, types
path = sys.argv[1]
module = types.ModuleType("__main__")
module.__file__ = path
sys.modules["__main__"] = module
code = compile(open(path).read(), path, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
if code.co_flags & inspect.CO_COROUTINE:
    asyncio.run(eval(code, module.__dict__))
else:
    exec(code, module.__dict__)
"""


def run_python(snippet: Snippet, workspace: Path) -> None:
    path = workspace / (snippet.file_name or f".snippet_{snippet.line}.py")
    path.write_text(snippet.text)
    status, output = run([sys.executable, "-c", RUN_PYTHON, str(path)], workspace)
    if status:
        pytest.fail(f"{snippet} ended with {status}\n{output}", pytrace=False)


@dataclass
class Command:
    text: str
    expected: str
    status: int


def commands_of(snippet: Snippet) -> list[Command]:
    commands: list[Command] = []
    for line in snippet.text.splitlines():
        if line.startswith("$ "):
            commands.append(Command(line[2:], "", 0))
        elif line.startswith("> ") and commands and not commands[-1].expected:
            commands[-1].text += f"\n{line[2:]}"
        elif commands:
            commands[-1].expected += f"{line}\n"
        elif line.strip():
            raise ValueError(f"{snippet}: output before the first line with '$ '")
    for command in commands:
        if match := re.search(r"\s+# exit (\d+)$", command.text):
            command.status = int(match[1])
    return commands


def matches(expected: str, shown: str, *, others_write: bool = False) -> bool:
    """Compare line by line, without trailing space; see the module's docstring for ``...``."""
    parts = []
    for line in expected.strip("\n").splitlines():
        if line.strip() == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(".*?".join(re.escape(piece) for piece in line.rstrip().split("...")) + r"\n")
    between = r"(?:.*\n)*?" if others_write else ""
    pattern = between + between.join(parts) + between
    text = "".join(f"{line.rstrip()}\n" for line in shown.strip("\n").splitlines())
    return re.fullmatch(pattern, text) is not None


def run_console(snippet: Snippet, workspace: Path) -> None:
    commands = commands_of(snippet)
    mark = "---8<--- dynwire snippet"
    script = "".join(f'{command.text}\necho "{mark} $?"\n' for command in commands)
    status, output = run(["bash", "-c", script], workspace)
    pieces = re.split(rf"{mark} (\d+)\n", output)  # output, status, output, status, …
    others_write = any(command.text.split("#")[0].rstrip().endswith("&") for command in commands)
    for index, command in enumerate(commands):
        if 2 * index + 1 >= len(pieces):
            pytest.fail(f"{snippet}: bash ended with {status} in: {command.text}\n{output}", pytrace=False)
        shown, status = pieces[2 * index], int(pieces[2 * index + 1])
        if status != command.status:
            pytest.fail(f"{snippet}: {command.text}\nended with {status}, not {command.status}:\n{shown}", pytrace=False)
        if command.expected.strip() and not matches(command.expected, shown, others_write=others_write):
            pytest.fail(f"{snippet}: {command.text}\nshould print\n{command.expected}\nbut printed\n{shown}", pytrace=False)


def run_snippet(snippet: Snippet, workspace: Path) -> None:
    if snippet.file_name:
        (workspace / snippet.file_name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / snippet.file_name).write_text(snippet.text)
    if snippet.no_test:
        pytest.skip(snippet.no_test)
    match snippet.language:
        case "python":
            run_python(snippet, workspace)
        case "console":
            for program in ("curl", "jq"):
                if re.search(rf"\b{program} -|\| {program}\b", snippet.text) and shutil.which(program) is None:
                    pytest.skip(f"{program} is not installed (apt-get install {program})")
            run_console(snippet, workspace)
        case "bash" | "sh":
            status, output = run(["bash", "-euo", "pipefail", "-c", snippet.text], workspace)
            if status:
                pytest.fail(f"{snippet} ended with {status}\n{output}", pytrace=False)
        case "json":
            json.loads(snippet.text)
        case "toml":
            tomllib.loads(snippet.text)
        case other:
            assert other in NOT_RUN, f"{snippet}: unknown language; what is not run: {sorted(NOT_RUN)}"


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory per document."""
    return {document: tmp_path_factory.mktemp("document") for document in {snippet.document for snippet in SNIPPETS}}


@pytest.mark.hard_timeout(80)
@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_snippet(snippet: Snippet, workspaces: dict[str, Path]) -> None:
    run_snippet(snippet, workspaces[snippet.document])


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in DOCUMENTS
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
        if not (path.parent / target).exists()
    ]
    assert broken == []


# --- the runner itself --------------------------------------------------------------------------------------------------------


def one(text: str) -> Snippet:
    (snippet,) = snippets_of("sample.md", text)
    return snippet


def test_finding_snippets() -> None:
    text = "a\n```python\nx = 1\n```\n<!-- no-test: needs a GPU -->\n\n  ```console\n  $ ls\n  ```\n```\nplain\n```\n"
    assert list(snippets_of("a.md", text)) == [
        Snippet("a.md", 2, "python", "x = 1\n"),
        Snippet("a.md", 7, "console", "$ ls\n", "needs a GPU"),
        Snippet("a.md", 10, "", "plain\n"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "```python\nimport asyncio\nawait asyncio.sleep(0)\nassert __name__ == '__main__'\n```",
        "```python\n# sub/hello.py\nimport pathlib\nassert pathlib.Path('sub/hello.py').exists()\n```",
        "```console\n$ echo one\none\n$ printf 'took 12 ms\\nb\\nc\\n'\ntook ... ms\n...\nc\n$ false # exit 1\n```",
        "```console\n$ sleep 30 &\n$ echo $DYN_FILE_KV\n/.../.discovery\n```",
        "```console\n$ for i in 1 2; do\n> echo $i; done\n1\n2\n```",
        "```console\n$ test $DYN_HTTP_RPC_PORT = 8888 && echo $DYN_HTTP_RPC_PORT; echo http://localhost:8888/x\n8888\nhttp://localhost:8888/x\n```",
        "```bash\ntest -d .\n```",
        '```toml\na = "b"\n```',
    ],
)
def test_snippets_that_pass(text: str, tmp_path: Path) -> None:
    run_snippet(one(text), tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nraise ValueError('no good')\n```", "no good"),
        ("```console\n$ echo one\ntwo\n```", "should print"),
        ("```console\n$ echo one; echo two\none\n```", "should print"),
        ("```console\n$ exit 3\n```", "bash ended with 3"),
        ("```console\n$ false\n```", "ended with 1, not 0"),
        ("```bash\nfalse\ntrue\n```", "ended with 1"),
    ],
)
def test_snippets_that_fail(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=complaint):
        run_snippet(one(text), tmp_path)


def test_an_unknown_language_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unknown language"):
        run_snippet(one("```pyhton\nx\n```"), tmp_path)


def test_background_processes_end_with_their_snippet(tmp_path: Path) -> None:
    run_snippet(one("```console\n$ sleep 1000 & echo $! > pid\n```"), tmp_path)
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or ") Z " in stat.read_text(), shlex.join(["ps", str(pid)])
