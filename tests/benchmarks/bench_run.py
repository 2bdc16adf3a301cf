"""What a run costs beyond its agents: python tests/benchmarks/bench_run.py [--quick]

A destructive phase in milliseconds and git processes, from the start of one agent to that of the
next, without the agent itself: with 100, 1,000 and 10,000 items, and beside 20,000 files. The halt
commit beside "bare", which is `git add BACKLOG.yaml && git commit -qm x`, measured in turn with it.
Prints one table: figure, goal, verdict; exits 1 if a goal is missed. `--quick` leaves out what is
large. `--tool FILE` measures another orchestrator.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROUNDS = 9
FEW, MANY = 4, 20  # phases of a short and a long run; the difference leaves out start and halt
TOOL = Path(__file__).resolve().parents[2] / "orchestrator.py"
IDENTITY = ("-c", "user.name=Bench", "-c", "user.email=bench@example.invalid")

AGENT = """#!/bin/sh
case $ORCHESTRATOR_PHASE in
build*) echo "$ORCHESTRATOR_ITEM_ID" >> code.txt ;;
*) echo x > "$ORCHESTRATOR_CHANGE_DIR/$ORCHESTRATOR_PHASE.md" ;;
esac
printf '{"item_id":"%s","phase":"%s","result":"phase_complete","summary":"done"}' \\
    "$ORCHESTRATOR_ITEM_ID" "$ORCHESTRATOR_PHASE" > "$ORCHESTRATOR_RESULT_PATH"
"""
SLOW_AGENT = AGENT.replace("#!/bin/sh\n", "#!/bin/sh\nfor n in 1 2 3 4 5; do echo $n; sleep 0.1; done\n")
STUBBORN_AGENT = "#!/bin/sh\ntrap 'exit 0' TERM\necho > ../ready\nwhile :; do sleep 0.01; done\n"

# Runs the tool within itself, and writes down what it did: git processes, lag.
PROBE = """
import asyncio, json, os, sys, time
tool, report, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(tool))
seen = {"git": 0, "agents": []}
def watch(event, args):
    if event == "subprocess.Popen":
        if args[1][0] == "git":
            seen["git"] += 1
        else:
            seen["agents"].append(time.perf_counter())
sys.addaudithook(watch)
lags, run = [], asyncio.run
async def sampled(main):
    async def sample():
        while True:
            before = asyncio.get_running_loop().time()
            await asyncio.sleep(0.005)
            lags.append(asyncio.get_running_loop().time() - before - 0.005)
    sampler = asyncio.ensure_future(sample())
    try:
        return await main
    finally:
        sampler.cancel()
if os.environ.get("BENCH_LAG"):
    asyncio.run = lambda main: run(sampled(main))
import orchestrator
code = orchestrator.main()
lags.sort()
seen["lag_ms"] = 1000 * lags[len(lags) * 99 // 100] if lags else 0
open(report, "w").write(json.dumps(seen))
sys.exit(code)
"""

STARTER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(os.wait4(process.pid, 0)[2].ru_maxrss)
"""


class Figure(NamedTuple):
    """One line of the table."""

    what: str
    value: float
    unit: str
    goal: float
    how: str = ""


# ==== Surroundings ================================================================================


def sh(where: Path, *argv: str) -> str:
    done = subprocess.run(argv, cwd=where, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{argv} exited {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def make_repository(where: Path, files: int = 0) -> Path:
    where.mkdir()
    sh(where, "git", "init", "-q", "-b", "main")
    for key, value in (("name", "Bench"), ("email", "bench@example.invalid"), ("x", "")):
        sh(where, "git", "config", f"user.{key}", value)
    for n in range(files):
        folder = where / f"src/{n % 200:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.txt").write_text(f"{n}\n")
    (where / "BACKLOG.yaml").write_text("v: 0\n")
    sh(where, "git", "add", "-A")
    sh(where, "git", "commit", "-qm", "Start")
    return where


def make_project(
    where: Path, items: int, agent: str = AGENT, concurrent: int = 1, files: int = 0
) -> Path:
    make_repository(where, files)
    (where / "agent.sh").write_text(agent)
    (where / "orchestrator.toml").write_text(
        f"""[agent]
cli = "command"
command = ["sh", "./agent.sh"]
[execution]
max_wip = {concurrent}
max_concurrent = {concurrent}
[pipelines.feature]
phases = [{{name = "build", destructive = true}}, {{name = "build-more", destructive = true}}]
[pipelines.papers]
phases = [{{name = "prd"}}, {{name = "design"}}]
"""
    )
    pipeline = "papers" if concurrent > 1 else "feature"
    rows = [
        f"""- id: WRK-{n:03d}
  title: Item number {n}
  status: ready
  size: small
  complexity: low
  risk: low
  impact: medium
  pipeline_type: {pipeline}
  created: 2026-01-01T00:00:00+00:00
  updated: 2026-01-01T00:00:00+00:00
"""
        for n in range(1, items + 1)
    ]
    head = f"schema_version: 3\nnext_item_id: {items}\nitems:\n"
    (where / "BACKLOG.yaml").write_text(head + "".join(rows))
    sh(where, "git", "add", "-A")
    sh(where, "git", "commit", "-qm", "Project")
    return where


def start_tool(tool: Path, where: Path, *args: str, lag: bool = False) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", PROBE, str(tool), str(where.parent / "report"), *args]
    env = {**os.environ, **({"BENCH_LAG": "1"} if lag else {})}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(argv, cwd=where, env=env, stdout=quiet, stderr=quiet)


def run_tool(tool: Path, where: Path, *args: str, lag: bool = False) -> tuple[float, dict[str, Any]]:
    """Seconds that a command took, and what the probe saw."""
    began = time.perf_counter()
    code = start_tool(tool, where, *args, lag=lag).wait()
    took = time.perf_counter() - began
    if code not in (0, 3):
        raise SystemExit(f"{args} exited {code} in {where}")
    return took, json.loads((where.parent / "report").read_text())


def peak_mb(argv: Sequence[str | Path], where: Path) -> float:
    """The largest resident size of a command, as an operator starts it.

    Started by a small process: the kernel counts what the one that forks has, too.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", STARTER, *argv], cwd=where, env=env, capture_output=True, text=True
    )
    return int(done.stdout) / (1024 * (1024 if sys.platform == "darwin" else 1))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bare_commit(where: Path, files: Sequence[str], text: str) -> float:
    """Seconds that git takes to commit new contents of these files."""
    for name in files:
        (where / name).parent.mkdir(exist_ok=True)
        with open(where / name, "a") as file:
            file.write(text)
    line = f"git add {' '.join(files)} && git commit -qm x"
    return timed(lambda: sh(where, "sh", "-c", line))


# ==== What is measured ============================================================================


def halt_commits(tool: Path, folder: Path, files: int, goal: float) -> Iterator[Figure]:
    """A state commit as a halt makes it, and one that finds nothing to do."""
    sys.path.insert(0, str(tool.parent))
    from gitutil import Repo

    where = make_repository(folder / f"halt-{files}", files)
    path, processes = where / "BACKLOG.yaml", [0]
    sys.addaudithook(
        lambda event, args: processes.append(1)
        if event == "subprocess.Popen" and args[1][0] == "git" and args[1][1] == "-c"
        else None
    )
    ours, theirs, made, clean = [], [], 0, 0
    for n in range(ROUNDS):
        theirs.append(bare_commit(where, ["BACKLOG.yaml"], f"theirs: {n}\n"))
        repo = Repo.open(where)
        path.write_bytes(data := path.read_bytes() + b"ours: %d\n" % n)
        before = len(processes)
        ours.append(timed(lambda: repo.commit_state(path, data, "halt")))  # noqa: B023
        made, before = len(processes) - before, len(processes)
        if repo.commit_state(path, data, "halt").outcome != "clean":
            raise SystemExit("the state commit did not work")
        clean = len(processes) - before
    ratio = statistics.median(ours) / statistics.median(theirs)
    size = f"{files:,} files" if files else "small repository"
    text = f"{1000 * statistics.median(ours):.1f} ms, bare {1000 * statistics.median(theirs):.1f} ms"
    yield Figure(f"halt commit, {size}", ratio, "x bare", goal, text)
    if not files:
        yield Figure("git processes of a halt commit", made, "", 15)
        yield Figure("git processes of a halt, clean backlog", clean, "", 5)


def phases(tool: Path, folder: Path, items: int, files: int, rounds: int, goal_ms: float) -> Iterator[Figure]:
    """What a phase costs from the start of an agent to the start of the next one."""
    times, processes = [], []
    for n in range(rounds):
        where = make_project(folder / f"phases-{items}-{files}-{n}", items, files=files)
        _, few = run_tool(tool, where, "run", "--cap", str(FEW))
        _, many = run_tool(tool, where, "run", "--cap", str(MANY))
        processes.append((many["git"] - few["git"]) / (MANY - FEW))
        gaps = statistics.median(b - a for a, b in itertools.pairwise(many["agents"]))
        times.append(1000 * (gaps - statistics.median(time_agent(where) for _ in range(9))))
    size = f"{items:,} items" + (f", {files:,} files" if files else "")
    text = f"rounds: {', '.join(f'{one:.0f}' for one in times)}"
    yield Figure(f"a phase beyond its agent, {size}", statistics.median(times), "ms", goal_ms, text)
    yield Figure(f"git processes of a phase, {size}", statistics.mean(processes), "", 20)


def time_agent(where: Path) -> float:
    """The agent alone, in a phase that writes a document."""
    env = {
        **os.environ,
        "ORCHESTRATOR_ITEM_ID": "WRK-001",
        "ORCHESTRATOR_PHASE": "prd",
        "ORCHESTRATOR_CHANGE_DIR": str(where / ".orchestrator"),
        "ORCHESTRATOR_RESULT_PATH": str(where / ".orchestrator/bench.json"),
    }
    return timed(lambda: subprocess.run(["sh", "./agent.sh"], cwd=where, env=env, check=True))


def memory(tool: Path, folder: Path) -> Iterator[Figure]:
    where = make_project(folder / "memory", 100)
    rss = peak_mb([sys.executable, str(tool), "run", "--cap", str(FEW)], where)
    yield Figure("memory of a run, 100 items", rss, "MB", 45)


def start(tool: Path, folder: Path) -> Iterator[Figure]:
    where = make_project(folder / "start", 100)
    with open(where / "BACKLOG.yaml", "a") as file:
        file.write("# edited\n")
    _, dirty = run_tool(tool, where, "run", "--only", "status=done")
    yield Figure("git processes of a start and a dirty halt", dirty["git"], "", 25)


def ending(tool: Path, folder: Path) -> Iterator[Figure]:
    """From SIGTERM to the exit, with an agent that obeys within 10 ms."""
    times = []
    for n in range(5):
        where = make_project(folder / f"ending-{n}", 100, STUBBORN_AGENT)
        os.mkfifo(where.parent / "ready") if n == 0 else None
        process = start_tool(tool, where, "run", "--cap", "1")
        (where.parent / "ready").read_text()
        process.send_signal(signal.SIGTERM)
        times.append(timed(process.wait))
    yield Figure("from SIGTERM to the exit", 1000 * statistics.median(times), "ms", 300)


def crowd(tool: Path, folder: Path) -> Iterator[Figure]:
    where = make_project(folder / "crowd", 1000, SLOW_AGENT, concurrent=10)
    _, seen = run_tool(tool, where, "run", "--cap", "60", lag=True)
    yield Figure("event loop lag, p99, ten agents, 1,000 items", seen["lag_ms"], "ms", 20)


def figures(tool: Path, folder: Path, *, quick: bool) -> Iterator[Figure]:
    yield from halt_commits(tool, folder, 0, 3)
    yield from phases(tool, folder, 100, 0, 5, 110)
    if not quick:
        yield from halt_commits(tool, folder, 20_000, 3)
        yield from phases(tool, folder, 1_000, 0, 3, 190)
        yield from phases(tool, folder, 10_000, 0, 3, 510)
        yield from phases(tool, folder, 100, 20_000, 3, 500)
    yield from start(tool, folder)
    yield from memory(tool, folder)
    yield from ending(tool, folder)
    yield from crowd(tool, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tool", type=Path, default=TOOL)
    args = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory(prefix="bench-run-") as folder:
        for figure in figures(args.tool.resolve(), Path(folder), quick=args.quick):
            good = figure.value <= figure.goal
            missed += not good
            goal = f"goal {figure.goal:g}" if figure.goal < float("inf") else ""
            print(
                f"{figure.what:55} {figure.value:8.2f} {figure.unit:7} {goal:10}"
                f" {'' if good else 'MISSED':7} {figure.how}",
                flush=True,
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
