#!/usr/bin/env python3
"""How fast is dynwire's serving stack beside Dynamo's, on the same machine, at the same minute?

Both sides are a frontend process and a worker process with a simulated engine that takes no time of its own (``--speedup-ratio
1000000``), over the tcp request plane, with file discovery, and with the same model. Both get the same requests from the same
load generator (peers/openload.c, compiled on the spot), which checks every answer. A round runs each side once, in turn; the
next round starts with the other one. Reported are medians over rounds with minimum and maximum, and at the end the ratios that
are promised (promises.py).

    python benchmarks/serving.py --short                      every promised ratio, under 3 minutes
    python benchmarks/serving.py                              more workloads and rounds
    python benchmarks/serving.py --only 'stream.*c32' --check
    python benchmarks/serving.py --peers dynwire              without Dynamo

Dynamo runs in an environment of its own, which ``benchmarks/peers/dynamo_stack.sh .venv-dynamo`` makes (``make bench-serving``
does it by itself); ``--dynamo DIRECTORY`` names another one.

Nothing is pinned: generator, frontend and worker of a side share all cores, alike for both sides, and the other side's processes
sleep meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE), str(HERE / "peers")]

import common  # noqa: E402 - lies in peers/
import compare  # noqa: E402 - lies beside this script
import compare_http  # noqa: E402
from compare import Peer, PeerFailed, human  # noqa: E402
from promises import SERVING_PROMISES  # noqa: E402

from dynwire.loadgen.http import Target  # noqa: E402 - of the tree that this script lies in
from dynwire.loadgen.prompts import WORDS, Prompts, Shape  # noqa: E402
from dynwire.mocker import TINY_MODEL  # noqa: E402

MODEL = "tiny"
SPEEDUP = "1000000"
PROMPTS = 4000
"""different requests; more than are sent in one measurement, so that no prefix is cached but the template's"""
WARM_UP_S = 0.3
READY_S = 60.0
"""Dynamo's frontend takes several seconds to import what it needs"""
VOCABULARY = 2048
"""Dynamo's engine answers with random tokens from 1,000 to 2,000: they have to be text, or it would send next to nothing"""
PAUSE_S = 0.03
"""Between two reads of an ordinary client that is late: what a delayed acknowledgement takes is 40 ms, a token far less"""

PEERS: dict[str, Peer] = {
    "dynwire": Peer("dynwire", "python -m dynwire.frontend and python -m dynwire.mocker"),
    "dynamo": Peer("dynamo", "python -m dynamo.frontend and python -m dynamo.mocker, ai-dynamo 1.6.1"),
}


@dataclasses.dataclass(frozen=True)
class ServingRow(compare.Row):
    """``items`` is the number of tokens per answer, ``size`` the number of words per prompt.

    With a ``rate`` the requests come at random moments, so many per second, over at most ``concurrency`` connections.
    """

    rate: float = 0.0

    @property
    def name(self) -> str:
        return self.label

    def unit(self) -> str:
        return "answers/s" if self.kind == "unary" else "tokens/s"


def all_rows() -> list[ServingRow]:
    def row(
        level: int, label: str, workload: str, kind: str, tokens: int, concurrency: int, words: int = 32, rate: float = 0.0
    ) -> ServingRow:
        where = ("stack", "free", "uvloop", "default")
        who = ("dynwire", "dynamo")
        return ServingRow(workload, kind, words, concurrency, who, level, label, *where, items=tokens, rate=rate)

    return [
        row(0, "unary-16-c32", "load", "unary", 16, 32),
        row(0, "unary-16-c128", "load", "unary", 16, 128),
        row(0, "stream-128-c32", "load", "stream", 128, 32),
        row(0, "stream-128-c128", "load", "stream", 128, 128),
        row(0, "arrivals-128-r100", "load", "stream", 128, 64, rate=100.0),
        row(0, "stream-128-c1", "load", "stream", 128, 1),
        row(0, "ordinary-128-c1", "ordinary", "stream", 128, 1),
        row(1, "stream-128-c8", "load", "stream", 128, 8),
        row(1, "stream-16-c32", "load", "stream", 16, 32),
        row(1, "unary-128-c32", "load", "unary", 128, 32),
        row(1, "unary-1-c32", "load", "unary", 1, 32),
        row(1, "long-prompt-stream-128-c32", "load", "stream", 128, 32, 1000),
    ]


def select_rows(args: argparse.Namespace) -> list[ServingRow]:
    chosen = []
    for row in all_rows():
        if row.level > (0 if args.short else 1) or (args.only and not re.search(args.only, row.name)):
            continue
        contestants = tuple(c for c in row.contestants if compare.takes_part(c, args))
        if contestants:
            chosen.append(dataclasses.replace(row, contestants=contestants))
    return chosen


def shape_of(row: ServingRow) -> Shape:
    return Shape(MODEL, stream=row.kind == "stream", prompt_words=row.size, max_tokens=row.items)


def make_model(directory: Path) -> None:
    """The tiny model of the package with more tokens behind its own; prompts are encoded as before."""
    shutil.copytree(TINY_MODEL, directory)
    for name in ("config.json", "tokenizer.json"):
        path = directory / name
        found = json.loads(path.read_text())
        if name == "config.json":
            found["vocab_size"] = VOCABULARY
        else:
            pairs = (f"\u0120{first}{second}" for first in WORDS for second in WORDS)
            vocabulary = found["model"]["vocab"]
            while len(vocabulary) < VOCABULARY:
                vocabulary.setdefault(next(pairs), len(vocabulary))
        path.write_text(json.dumps(found))


class Stack(compare.Pair):
    """Frontend and worker of one side."""

    bench: ServingBench

    def start(self) -> None:
        self.port = common.free_port()
        discovery = os.path.join(self.directory, "discovery")
        os.mkdir(discovery)
        # settings of the caller's own deployment are none of ours
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "DYNWIRE_", "NATS_", "ETCD_"))}
        env = {**kept, "DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": discovery, "DYN_REQUEST_PLANE": "tcp"}
        env |= {"DYN_TCP_RPC_HOST": "127.0.0.1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
        model = ["--model-path", str(self.bench.model), "--model-name", MODEL, "--speedup-ratio", SPEEDUP]
        if self.name == "dynamo":
            env |= {"DYN_TCP_RESPONSE_STREAM_HOST": "lo", "DYN_LOG": "error"}
            env.pop("PYTHONPATH", None)
            python = str(self.bench.dynamo_python)
        else:
            env["PYTHONPATH"] = str(ROOT)
            python = sys.executable
        self.worker = self.launch([python, "-m", f"{self.name}.mocker", *model], env)
        self.frontend = self.launch([python, "-m", f"{self.name}.frontend", "--http-port", str(self.port)], env)
        self.server = self.client = self.frontend
        self.await_model()
        self.trees = [compare_http.process_tree(process.pid) for process in (self.frontend, self.worker)]
        self.pids = [pid for tree in self.trees for pid in tree]

    def launch(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.log,
            env=env,
            cwd=self.directory,
            process_group=0,  # Ctrl-C is for us; scheduled with us where the kernel groups by session
        )
        self.processes.append(process)
        return process

    def await_model(self) -> None:
        """Until a request is answered: a model may be listed a moment before its worker can be reached."""
        end = time.monotonic() + READY_S
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}).encode()
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        while True:
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=5) as response:
                    response.read()
                    return
            except (OSError, urllib.error.HTTPError) as error:
                reason = error
            for process in self.processes:
                if process.poll() is not None:
                    raise PeerFailed(f"{process.args[2]} ended: {self.log_tail()}")  # type: ignore[index]
            if time.monotonic() > end:
                raise PeerFailed(f"no answer within {READY_S:g} s: {reason}")
            time.sleep(0.05)

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        super().stop()

    def cpu_s(self) -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        own = used.ru_utime + used.ru_stime
        return sum(map(common.process_cpu_s, self.pids)) + compare_http.children_cpu_s() + own

    def run(self, row: compare.Row, kind: str, seconds: float) -> dict[str, Any]:
        assert isinstance(row, ServingRow)
        measure = self.load if row.workload == "load" else self.ordinary
        try:
            result = self.watched(lambda: measure(row, seconds))
        except PeerFailed as error:
            for process in self.processes:
                if process.poll() is not None:
                    raise PeerFailed(f"{error}; a process ended: {self.log_tail()}") from None
            raise
        result["rss_frontend"], result["rss_worker"] = (sum(map(compare.rss_bytes, tree)) for tree in self.trees)
        return result

    def load(self, row: ServingRow, seconds: float) -> dict[str, Any]:
        command = [str(self.bench.openload), str(self.port), str(self.bench.requests_file(row, self.port)), str(row.concurrency)]
        command += [str(row.rate), str(WARM_UP_S), str(seconds), str(row.items), "1", ",".join(map(str, self.pids))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise PeerFailed(f"openload: {(done.stderr.strip().splitlines() or ['no output'])[-1]}") from None
        if "error" in found:
            raise PeerFailed(found["error"])
        tokens = found["done"] * row.items
        frontend = sum(found["cpu"][: len(self.trees[0])])
        worker = sum(found["cpu"][len(self.trees[0]) :])
        units = found["done"] if row.kind == "unary" else tokens
        return {
            **found,
            "units": units,
            "rate": units / found["seconds"],
            "cpu_frontend_s_per_1k": frontend / tokens * 1e3,
            "cpu_worker_s_per_1k": worker / tokens * 1e3,
            "cpu_s_per_1k": (frontend + worker) / tokens * 1e3,
            "generator_busy": found["cpu_generator"] / found["seconds"],
            "events_per_answer": found["events"] / found["done"],
            "reads_per_answer": found["reads"] / found["done"],
        }

    def ordinary(self, row: ServingRow, seconds: float) -> dict[str, Any]:
        """One streamed answer after the other with httpx, which is what openai's client is made of."""
        import httpx

        prompts = Prompts(shape_of(row), 1)
        url = f"http://127.0.0.1:{self.port}{prompts.path}"
        took, first, late, started = [], [], 0, time.monotonic()
        with httpx.Client(timeout=30) as client:
            while time.monotonic() < started + seconds or len(took) < 5:
                begin = time.perf_counter()
                last, times = begin, []
                data = b""
                with client.stream("POST", url, content=prompts.next(), headers={"content-type": "application/json"}) as response:
                    for part in response.iter_raw():
                        times.append(time.perf_counter())
                        data = (data + part)[-1000:]
                if response.status_code != 200 or not data.rstrip().endswith(b"[DONE]"):
                    raise PeerFailed(f"status {response.status_code}, an answer that ends with {data[-60:]!r}")
                for moment in times:
                    if moment - last > PAUSE_S:
                        late += 1
                        break
                    last = moment
                first.append(times[0] - begin)
                took.append(time.perf_counter() - begin)
        took.sort()
        return {
            "done": len(took),
            "units": len(took) * row.items,
            "seconds": time.monotonic() - started,
            "rate": len(took) * row.items / (time.monotonic() - started),
            "latency_p50_us": statistics.median(took) * 1e6,
            "latency_p99_us": took[len(took) * 99 // 100] * 1e6,
            "ttft_p50_us": statistics.median(first) * 1e6,
            "late_share": late / len(took),
        }


METRICS = (
    "rate",
    "ttft_p50_us",
    "ttft_p99_us",
    "latency_p50_us",
    "latency_p99_us",
    "late_share",
    "cpu_s_per_1k",
    "cpu_frontend_s_per_1k",
    "cpu_worker_s_per_1k",
    "generator_busy",
    "events_per_answer",
    "reads_per_answer",
    "rss_frontend",
    "rss_worker",
    "others",
)


class ServingBench(compare.Bench):
    peers = PEERS
    caption = "dynwire's serving stack beside Dynamo's: generator, frontend and worker share all cores"

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.openload = Path(self.scratch) / "openload"
        self.dynamo_python = args.dynamo / "bin" / "python"
        self.files: dict[tuple[str, int], Path] = {}
        self.model = Path(self.scratch) / "model"

    def rows(self) -> list[compare.Row]:
        return list(select_rows(self.args))

    def make_pair(self, peer_name: str, row: compare.Row) -> Stack:
        return Stack(peer_name, row, self)

    def prepare(self, rows: list[compare.Row]) -> list[compare.Row]:
        compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
        if compiler is None:
            raise SystemExit("the load generator needs a C compiler: install gcc, or name one with CC")
        built = subprocess.run(
            [compiler, "-O2", "-o", str(self.openload), str(HERE / "peers" / "openload.c"), "-lm"], capture_output=True, text=True
        )
        if built.returncode:
            raise SystemExit(f"openload.c does not compile:\n{built.stderr}")
        make_model(self.model)
        if any("dynamo" in row.contestants for row in rows):
            code = "import dynamo.frontend, dynamo.mocker"
            reason = "there is none"
            if self.dynamo_python.exists():
                done = subprocess.run([self.dynamo_python, "-c", code], capture_output=True, text=True)
                reason = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it fails"])[-1]
            if reason:
                self.missing["dynamo"] = reason
                self.note(
                    f"dynamo is left out, no stack in {self.args.dynamo} ({reason}): benchmarks/peers/dynamo_stack.sh "
                    f"{self.args.dynamo}"
                )
        return rows

    def requests_file(self, row: ServingRow, port: int) -> Path:
        key = (row.label, port)
        if key not in self.files:
            prompts, target = Prompts(shape_of(row), len(self.files) // 2), Target(f"http://127.0.0.1:{port}")
            path = self.files[key] = Path(self.scratch) / f"requests-{len(self.files)}"
            made = [target.post(prompts.path, prompts.next()) for _ in range(PROMPTS)]
            path.write_bytes(b"".join([struct.pack("<I", len(request)) + request for request in made]))
        return self.files[key]

    def summarize(self, row: compare.Row, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        contestants = {}
        for name, raw in runs.items():
            metrics = {}
            for metric in METRICS:
                values = [run[metric] for run in raw if run.get(metric) is not None]
                if values:
                    metrics[metric] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            if raw:
                contestants[name] = {"about": PEERS[name].about, "rounds": len(raw), **metrics, "raw": raw}
        return {
            "name": row.name,
            "workload": row.workload,
            "kind": row.kind,
            "prompt_words": row.size,
            "tokens": row.items,
            "concurrency": row.concurrency,
            "arrivals_per_s": row.rate,
            "unit": row.unit(),
            "family": row.family,
            "contestants": contestants,
        }

    def brief(self, result: dict[str, Any]) -> str:
        parts = []
        for name, c in result["contestants"].items():
            cpu = f", {c['cpu_s_per_1k']['median'] * 1e3:.2f} CPU ms/1k" if "cpu_s_per_1k" in c else ""
            first = c["ttft_p50_us"]["median"] / 1e3
            parts.append(f"{name} {human(c['rate']['median'])} {result['unit']}, first {first:.2f} ms{cpu}")
        return f"{result['name']}: " + "; ".join(parts or ["nobody took part"])


# Output -------------------------------------------------------------------------------------------------------------------


def about(row: dict[str, Any]) -> str:
    how = "streamed" if row["kind"] == "stream" else "in one piece"
    who = f"{row['concurrency']} at a time" if row["workload"] == "load" else "one after the other, by httpx"
    if row["arrivals_per_s"]:
        who = f"{row['arrivals_per_s']:g} per second at random moments, the same ones for both"
    return f"Chat answers of {row['tokens']} tokens, {how}, {who}; prompts of {row['prompt_words']} words."


COLUMNS: list[tuple[str, str, float, int]] = [
    # head, metric, factor, digits
    ("TTFT p50 ms", "ttft_p50_us", 1e-3, 2),
    ("TTFT p99 ms", "ttft_p99_us", 1e-3, 2),
    ("answer p50 ms", "latency_p50_us", 1e-3, 2),
    ("answer p99 ms", "latency_p99_us", 1e-3, 2),
    ("late answers %", "late_share", 100, 0),
    ("CPU ms/1k tokens", "cpu_s_per_1k", 1e3, 2),
    ("frontend", "cpu_frontend_s_per_1k", 1e3, 2),
    ("worker", "cpu_worker_s_per_1k", 1e3, 2),
    ("events/answer", "events_per_answer", 1, 1),
    ("reads/answer", "reads_per_answer", 1, 1),
    ("generator busy %", "generator_busy", 100, 0),
    ("others %", "others", 100, 0),
]


def row_table(row: dict[str, Any]) -> list[str]:
    used = [column for column in COLUMNS if any(column[1] in c for c in row["contestants"].values())]
    head = ["stack", f"{row['unit']} (min-max)", *[column[0] for column in used]]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, c in row["contestants"].items():
        rate = c["rate"]
        cells = [f"**{name}**" if name == "dynwire" else name]
        cells.append(f"{human(rate['median'])} ({human(rate['min'])}-{human(rate['max'])})")
        cells += [f"{c[metric]['median'] * factor:.{digits}f}" if metric in c else "-" for _, metric, factor, digits in used]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(report: dict[str, Any], stem: str) -> str:
    remarks = [
        "Frontend and worker process of each side, tcp plane, file discovery, one model, a simulated engine that takes no time",
        "of its own, so that every millisecond and every CPU second is the stack's. Generator, frontend and worker share all",
        "cores, alike for both sides. With so many answers at a time, the faster side is asked more often and both are",
        "saturated: times to the first token say there how long requests queue. In the row `arrivals` both get the same",
        "requests at the same moments, below what either can do. The generator acknowledges at once (TCP_QUICKACK); ordinary",
        "clients do not, and one of them is in the row `ordinary`. Late answers: those with a pause of more than 30 ms between",
        "two reads. CPU is that of frontend and worker. Events: chunks of a streamed answer as the client sees them. Others:",
        "share of the machine that other processes used meanwhile.",
    ]
    results: list[str] = []
    for row in report["rows"]:
        results += [f"## {row['name']}", "", about(row), "", *row_table(row), ""]
    return compare.page(report, stem, "dynwire's serving stack beside Dynamo's", remarks, PEERS, results)


CHARTS = [
    ("16 tokens in one piece, 32 at a time", r"^unary-16-c32$", "rate", "answers/s"),
    ("16 tokens in one piece, 128 at a time", r"^unary-16-c128$", "rate", "answers/s"),
    ("128 tokens streamed, 32 at a time", r"^stream-128-c32$", "rate", "tokens/s"),
    ("128 tokens streamed, 128 at a time", r"^stream-128-c128$", "rate", "tokens/s"),
    ("Time to first token, 32 at a time, p50", r"^stream-128-c32$", "ttft_p50_us", "µs (less is better)"),
    ("Time to first token, 100 arrivals/s, p50", r"^arrivals-128-r100$", "ttft_p50_us", "µs (less is better)"),
    ("CPU per 1,000 streamed tokens, 32 at a time", r"^stream-128-c32$", "cpu_s_per_1k", "s (less is better)"),
    ("CPU per 1,000 tokens in one piece", r"^unary-16-c32$", "cpu_s_per_1k", "s (less is better)"),
    ("Streamed answer, ordinary client, p50", r"^ordinary-128-c1$", "latency_p50_us", "µs (less is better)"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = compare.common_options((__doc__ or "").split("\n\n")[0], "short 5, else 7", "short 1, else 2", "short 165, else 900")
    parser.add_argument("--dynamo", type=Path, default=ROOT / ".venv-dynamo", help="environment of Dynamo's stack (.venv-dynamo)")
    args = parser.parse_args(argv)
    args.dynamo = args.dynamo.absolute()  # its processes run in a directory of their own
    return compare.complete(parser, args, "serving", *((5, 1.0, 165.0) if args.short else (7, 2.0, 900.0)))


def versions(python: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('ai-dynamo', 'ai-dynamo-runtime')}))"
    )
    if not python.exists():
        return {}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        compare.list_rows(list(select_rows(args)))
        return 0
    env = compare.environment(("dynwire", "uvloop", "granian", "tokenizers", "orjson", "msgspec", "Cython"))
    env["versions"] |= versions(args.dynamo / "bin" / "python")
    return compare.execute(args, ServingBench(args), env, SERVING_PROMISES, markdown, CHARTS)


if __name__ == "__main__":
    sys.exit(main())
