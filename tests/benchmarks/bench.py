"""What the tool costs beyond its agents: python tests/benchmarks/bench.py [--quick]

Every figure of the design's chapter on speed, in one table: figure, goal, verdict; exits 1 if a
goal is missed. A destructive phase is measured from the start of one agent to that of the next,
without the agent itself: with 100, 1,000 and 10,000 items, and beside 20,000 files. What a figure
is a ratio to is measured in turn with it: "bare" is `git add BACKLOG.yaml && git commit -qm x`,
"pass" `python -c pass`, "PyYAML" its C loader. `--quick` leaves out what is large.
"""

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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

TOOL = Path(__file__).resolve().parents[2] / "orchestrator.py"
sys.path.insert(0, str(TOOL.parent))

from backlog import parse_yaml  # noqa: E402
from gitutil import Repo  # noqa: E402

ROUNDS = 9
FEW, MANY = 4, 20  # phases of a short and a long run; the difference leaves out start and halt

AGENT = """#!/bin/sh
case $ORCHESTRATOR_PHASE in
build*) echo "$ORCHESTRATOR_ITEM_ID" >> code.txt ;;
*) echo x > "$ORCHESTRATOR_CHANGE_DIR/$ORCHESTRATOR_PHASE.md" ;;
esac
printf '{"item_id":"%s","phase":"%s","result":"phase_complete","summary":"done"}' \\
    "$ORCHESTRATOR_ITEM_ID" "$ORCHESTRATOR_PHASE" > "$ORCHESTRATOR_RESULT_PATH"
"""
STUBBORN_AGENT = "#!/bin/sh\ntrap 'exit 0' TERM\necho > ../ready\nwhile :; do sleep 0.01; done\n"

# Runs the tool within itself, and writes down what processes it started.
PROBE = """
import json, os, sys, time
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
import orchestrator
code = orchestrator.main()
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


def make_project(where: Path, items: int, agent: str = AGENT, files: int = 0) -> Path:
    make_repository(where, files)
    (where / "agent.sh").write_text(agent)
    (where / "orchestrator.toml").write_text(
        """[agent]
cli = "command"
command = ["sh", "./agent.sh"]
[pipelines.feature]
phases = [{name = "build", destructive = true}, {name = "build-more", destructive = true}]
"""
    )
    rows = [
        f"""- id: WRK-{n:03d}
  title: Item number {n}
  status: ready
  size: small
  complexity: low
  risk: low
  impact: medium
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


def start_tool(where: Path, *args: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", PROBE, str(TOOL), str(where.parent / "report"), *args]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(argv, cwd=where, stdout=quiet, stderr=quiet)


def run_tool(where: Path, *args: str) -> dict[str, Any]:
    """What the probe saw while a command ran."""
    code = start_tool(where, *args).wait()
    if code not in (0, 3):
        raise SystemExit(f"{args} exited {code} in {where}")
    seen: dict[str, Any] = json.loads((where.parent / "report").read_text())
    return seen


def peak_mb(argv: Sequence[str | Path], where: Path) -> float:
    """The largest resident size of a command; the kernel counts what the one that forks has, too."""
    size = int(sh(where, sys.executable, "-c", STARTER, *map(str, argv)))
    return size / (1024 * (1024 if sys.platform == "darwin" else 1))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(rounds: int, *works: Callable[[], object]) -> list[float]:
    """The median seconds of each, all taking turns: a busy neighbour slows all of them."""
    took = [[timed(work) for work in works] for _ in range(rounds)]
    return [statistics.median(each) for each in zip(*took, strict=True)]


# ==== What is measured ============================================================================


def starts(folder: Path) -> Iterator[Figure]:
    where = make_project(folder / "starts", 100)
    single = folder / "single.py"
    sh(where, sys.executable, str(TOOL), "vendor", str(single))
    commands = {"--version": (TOOL, 3.5), "status": (TOOL, 3.5), "--version of the single file": (single, 5)}
    works = [partial(sh, where, sys.executable, str(tool), what.split(" ")[0]) for what, (tool, _) in commands.items()]
    floor, *took = in_turn(ROUNDS, lambda: sh(where, sys.executable, "-c", "pass"), *works)
    for (what, (_, goal)), seconds in zip(commands.items(), took, strict=True):
        yield Figure(what, seconds / floor, "x pass", goal, f"{1000 * seconds:.0f} ms, pass {1000 * floor:.0f} ms")


def loads(folder: Path) -> Iterator[Figure]:
    try:
        import yaml
    except ImportError:
        print("PyYAML is not installed: loads are not compared with it")
        return
    for items in (100, 1000):
        data = (make_project(folder / f"load-{items}", items) / "BACKLOG.yaml").read_bytes()
        ours, theirs = in_turn(ROUNDS, lambda: parse_yaml(data), lambda: yaml.load(data, yaml.CSafeLoader))  # noqa: B023
        yield Figure(f"load of {items:,} items", ours / theirs, "x PyYAML", 1, f"{1000 * ours:.1f} ms")


def halt_commits(folder: Path, files: int) -> Iterator[Figure]:
    """A state commit as a halt makes it."""
    where = make_repository(folder / f"halt-{files}", files)
    path = where / "BACKLOG.yaml"

    def ours() -> None:
        data = path.read_bytes() + b"ours\n"
        path.write_bytes(data)
        if Repo.open(where).commit_state(path, data, "halt").outcome != "committed":
            raise SystemExit("the state commit did not work")

    def bare() -> None:
        path.write_bytes(path.read_bytes() + b"theirs\n")
        sh(where, "sh", "-c", "git add BACKLOG.yaml && git commit -qm x")

    made, theirs = in_turn(ROUNDS, ours, bare)
    size = f"{files:,} files" if files else "small repository"
    text = f"{1000 * made:.1f} ms, bare {1000 * theirs:.1f} ms"
    yield Figure(f"halt commit, {size}", made / theirs, "x bare", 3, text)


def phases(folder: Path, items: int, files: int, rounds: int, goal_ms: float) -> Iterator[Figure]:
    """What a phase costs from the start of an agent to the start of the next one."""
    times, processes = [], []
    for n in range(rounds):
        where = make_project(folder / f"phases-{items}-{files}-{n}", items, files=files)
        few = run_tool(where, "run", "--cap", str(FEW))
        many = run_tool(where, "run", "--cap", str(MANY))
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


def memory(folder: Path) -> Iterator[Figure]:
    where = make_project(folder / "memory", 100)
    rss = peak_mb([sys.executable, str(TOOL), "run", "--cap", str(FEW)], where)
    yield Figure("memory of a run, 100 items", rss, "MB", 45)


def ending(folder: Path) -> Iterator[Figure]:
    """From SIGTERM to the exit, with an agent that obeys within 10 ms."""
    times = []
    os.mkfifo(folder / "ready")
    for n in range(5):
        where = make_project(folder / f"ending-{n}", 100, STUBBORN_AGENT)
        process = start_tool(where, "run", "--cap", "1")
        (folder / "ready").read_text()
        process.send_signal(signal.SIGTERM)
        times.append(timed(process.wait))
    yield Figure("from SIGTERM to the exit", 1000 * statistics.median(times), "ms", 300)


def figures(folder: Path, *, quick: bool) -> Iterator[Figure]:
    yield from starts(folder)
    yield from loads(folder)
    yield from halt_commits(folder, 0)
    yield from phases(folder, 100, 0, 5, 110)
    if not quick:
        yield from halt_commits(folder, 20_000)
        yield from phases(folder, 1_000, 0, 3, 190)
        yield from phases(folder, 10_000, 0, 3, 510)
        yield from phases(folder, 100, 20_000, 3, 500)
    yield from ending(folder)
    yield from memory(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick, missed = parser.parse_args().quick, 0
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as an operator starts it
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for what, value, unit, goal, how in figures(Path(folder), quick=quick):
            missed += value > goal
            print(f"{what:48} {value:8.2f} {unit:8} goal {goal:<5g} {'MISSED' if value > goal else '':6} {how}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
