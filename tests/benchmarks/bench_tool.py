"""What the tool costs its operator: start, build of the single file, and a commit with the hook.

    python tests/benchmarks/bench_tool.py [ROUNDS]

Prints the best of many rounds, in milliseconds: a busy machine only ever adds to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "orchestrator.py"
FILES = 3000  # of the repository that is committed to
IDENTITY = {f"GIT_{role}_{key}": "x" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}


def best_ms(rounds: int, cwd: Path, *commands: list[str | Path]) -> list[float]:
    """The best wall time of each command, all taking turns."""
    best = [float("inf")] * len(commands)
    for _ in range(rounds):
        for number, argv in enumerate(commands):
            start = time.perf_counter()
            subprocess.run(argv, cwd=cwd, check=True, capture_output=True)
            best[number] = min(best[number], (time.perf_counter() - start) * 1000)
    return best


def make_repository(root: Path) -> Path:
    for number in range(FILES):
        path = root / f"d{number % 50}" / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n")
    (root / "BACKLOG.yaml").write_text("schema_version: 3\nitems: []\nnext_item_id: 0\n")
    for argv in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "Start"]):
        subprocess.run(["git", *argv], cwd=root, check=True)
    return root


def main(rounds: int) -> None:
    os.environ |= IDENTITY
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        single = here / "single.py"
        python = sys.executable
        [build] = best_ms(3, here, [python, PROGRAM, "vendor", single])
        print(f"single file: {single.stat().st_size:,} bytes, built in {build:.0f} ms")
        modules, alone = best_ms(rounds, here, *([python, one, "--version"] for one in (PROGRAM, single)))
        print(f"--version: modules {modules:.0f} ms, single file {alone:.0f} ms, ratio {alone / modules:.2f}")
        repo = make_repository(here / "repo")
        subprocess.run([python, PROGRAM, "hook", "install"], cwd=repo, check=True, capture_output=True)
        commit: list[str | Path] = ["git", "commit", "-q", "--allow-empty", "-m", "x"]
        for state in ("clean", "dirty"):
            bare, hooked = best_ms(5 * rounds, repo, [*commit, "--no-verify"], commit)
            print(f"commit, backlog {state}: {bare:.1f} ms, with the hook {hooked:.1f} ms")
            (repo / "BACKLOG.yaml").write_text("items: []\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
