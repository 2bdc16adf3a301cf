"""What it costs to start the tool: python tests/benchmarks/bench_start.py [ROUNDS]

Every line is a ratio of the best of many rounds, all commands taking turns, to an empty Python with
the same flags (`python3 -E -S -c pass`), or to PyYAML's C loader on the same file if PyYAML is
installed. The floors tell what no change to the code could go below: the modules of the standard
library that the command line needs, and the compilation of a main script of this size, which
Python does at every start. Exits 1 if a goal is missed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench_run import TOOL, make_project, peak_mb

ITEMS, MANY = 100, 10_000
LIBRARY = "import argparse, contextlib, datetime, enum, pathlib, re, signal, typing"
COMPILE = "import sys; compile(open(sys.argv[1]).read(), 'x', 'exec', dont_inherit=True)"
LOAD = "import sys, yaml; yaml.load(open(sys.argv[1], 'rb'), yaml.CSafeLoader)"


class Start(NamedTuple):
    """A command, what it is compared with, and the largest ratio wanted."""

    what: str
    argv: Sequence[str | Path]
    base: str = "pass"
    goal: float = float("inf")


def best_seconds(starts: Sequence[Start], cwd: Path, rounds: int) -> dict[str, float]:
    """The best wall time of each, all taking turns."""
    best = {start.what: float("inf") for start in starts}
    for _ in range(rounds):
        for start in starts:
            began = time.perf_counter()
            subprocess.run(start.argv, cwd=cwd, check=True, capture_output=True)
            best[start.what] = min(best[start.what], time.perf_counter() - began)
    return best


def report(starts: Sequence[Start], cwd: Path, rounds: int) -> bool:
    """Print the ratios; whether all are within their goals."""
    best, good = best_seconds(starts, cwd, rounds), True
    for start in starts:
        ratio = best[start.what] / best[start.base]
        missed = ratio > start.goal
        good &= not missed
        goal = f"goal {start.goal:g}" if start.goal < float("inf") else ""
        print(
            f"{start.what:44} {ratio:7.2f} x {start.base:14} {goal:9} {'MISSED' if missed else '':6}"
            f" {1000 * best[start.what]:7.1f} ms"
        )
    return good


def starts(python: Sequence[str], single: Path) -> list[Start]:
    """The starts of the goals, and their floors."""
    imported = [*python, "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); import orchestrator"]
    return [
        Start("pass", [*python, "-c", "pass"]),
        Start("--version", [*python, TOOL, "--version"], goal=3),
        Start("--help", [*python, TOOL, "--help"], goal=4),
        Start("status, 100 items", [*python, TOOL, "status"], goal=5),
        Start("single file", [*python, single, "--version"], "--version", 1.3),
        Start("floor: its standard library alone", [*python, "-c", LIBRARY]),
        Start("floor: compiling orchestrator.py alone", [*python, "-c", COMPILE, TOOL]),
        Start("importing it, compiled before", [*imported, TOOL.parent]),
    ]


def beside_pyyaml(python: str, where: Path) -> list[Start]:
    """Commands on a large backlog."""
    run = [python, TOOL]
    return [
        Start("PyYAML C load", [python, "-c", LOAD, where / "BACKLOG.yaml"], "PyYAML C load"),
        Start(f"status, {MANY:,} items", [*run, "status", "--json"], "PyYAML C load", 0.5),
        Start(f"add, {MANY:,} items", [*run, "add", "One more"], "PyYAML C load", 0.5),
    ]


def memory(python: str, where: Path) -> None:
    """The largest resident size of a start, of a run, and of their floor."""
    for what, argv in {
        "pass": ["-c", "pass"],
        "compiling orchestrator.py alone": ["-c", COMPILE, str(TOOL)],
        "--version": [str(TOOL), "--version"],
        "run --cap 4, 100 items": [str(TOOL), "run", "--cap", "4"],
    }.items():
        print(f"memory: {what:36} {peak_mb([python, *argv], where):7.1f} MB")


def main(rounds: int) -> int:
    python = sys.executable
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        here = Path(folder)
        single = here / "single.py"
        subprocess.run([python, TOOL, "vendor", single], check=True, capture_output=True)
        small = make_project(here / "small", ITEMS)
        good = report(starts([python, "-E", "-S"], single), small, rounds)
        if importlib.util.find_spec("yaml"):
            large = make_project(here / "large", MANY)
            good &= report(beside_pyyaml(python, large), large, max(3, rounds // 5))
        memory(python, small)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
