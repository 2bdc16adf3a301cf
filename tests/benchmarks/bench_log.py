"""How long `log` takes on a long history: python tests/benchmarks/bench_log.py [COMMITS]

Makes a repository of 10,000 commits, each of which moves one item of a backlog of 100 on by one
status or phase, and reads it back. The limit is 10 s of processor time, git's included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "orchestrator.py"
LIMIT_S = 10.0
OPEN_ITEMS = 100
STEPS = ("new", "scoping research", "ready", "in_progress prd", "in_progress design", "in_progress build")


def item_text(number: int, step: int) -> str:
    status, _, phase = STEPS[step].partition(" ")
    rows = {
        "id": f"WRK-{number:03}",
        "title": f"Item number {number} of a long history",
        "status": status,
        "phase": phase,
        "size": "small",
        "risk": "low",
        "description": "\n    context: What the item is about, in a sentence of usual length",
        "created": "2026-01-01T00:00:00+00:00",
        "updated": f"2026-01-01T00:00:0{step}+00:00",
    }
    return "- " + "  ".join(f"{key}: {value}\n".replace(": \n ", ":\n ") for key, value in rows.items() if value)


def versions(count: int) -> list[tuple[str, str]]:
    """(backlog, worklog line) of each commit: the oldest item moves on, in the end it is done."""
    items = dict.fromkeys(range(1, OPEN_ITEMS + 1), 0)
    texts = {number: item_text(number, 0) for number in items}
    found, highest = [], OPEN_ITEMS
    for turn in range(count):
        number = list(items)[turn // 3 % len(items)]
        items[number] += 1
        done = ""
        if items[number] == len(STEPS):
            del items[number], texts[number]
            done = f"## 2026-01-01T00:00:00+00:00 — WRK-{number:03} (Item)\n\n- **Status:** Done\n\n"
            highest += 1
            items[highest] = 0
            texts[highest] = item_text(highest, 0)
        else:
            texts[number] = item_text(number, items[number])
        body = "".join(texts.values())
        found.append((f"schema_version: 3\nitems:\n{body}next_item_id: {highest}\n", done))
    return found


def make_history(where: Path, count: int) -> None:
    """Write the history with one `git fast-import`."""
    subprocess.run(["git", "init", "-q", "-b", "main", str(where)], check=True)
    stream, worklog = [], ""
    for turn, (backlog, done) in enumerate(versions(count)):
        message = f"[WRK-001][build] Step {turn}\n\nOrchestrator-Run: 20260101T000000-abcdef\n"
        worklog += done
        files = {"BACKLOG.yaml": backlog} | ({"_worklog/2026-01.md": worklog} if done else {})
        stream.append(f"commit refs/heads/main\ncommitter A <a@b.invalid> {1_767_225_600 + turn} +0000\n")
        stream.append(f"data {len(message.encode())}\n{message}\n")
        stream += [f"M 100644 inline {path}\ndata {len(text.encode())}\n{text}\n" for path, text in files.items()]
    data = "".join(stream).encode()
    subprocess.run(["git", "fast-import", "--quiet"], cwd=where, input=data, check=True)
    subprocess.run(["git", "reset", "-q", "--hard"], cwd=where, check=True)


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        make_history(Path(folder), count)
        size = os.path.getsize(f"{folder}/BACKLOG.yaml")
        slow = False
        for options in ([], ["WRK-001"]):
            began, used = time.perf_counter(), os.times()
            argv = [sys.executable, str(SCRIPT), "--root", folder, "log", *options]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            took = time.perf_counter() - began
            now = os.times()
            cpu = now.children_user + now.children_system - used.children_user - used.children_system
            slow |= cpu > LIMIT_S or done.returncode != 0
            last = done.stdout.strip().splitlines()[-1:] or [done.stderr]
            print(f"log {' '.join(options):9} {count} commits, {size:,} bytes: {cpu:.2f} s ({took:.2f} s by the clock): {last[0]}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
