"""How long `select_actions` takes on large backlogs: python tests/benchmarks/bench_select.py

The limits are 20 ms for 10,000 items and 250 ms for 100,000: the choice is made in every turn of
the loop, so it must grow no faster than the backlog.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from backlog import Backlog, Item
from orchestrator import default_config, select_actions

LIMITS_MS = {1_000: 20, 10_000: 20, 100_000: 250}
STATUSES = ("new", "scoping", "ready", "in_progress", "blocked", "done")
PHASES = {"scoping": "research", "in_progress": "design"}
ROUNDS = 5


def make_backlog(count: int, statuses: tuple[str, ...]) -> Backlog:
    """Items of the given statuses in turn, each third one depending on its predecessor."""
    items: dict[str, Item] = {}
    for n in range(1, count + 1):
        status = statuses[n % len(statuses)]
        item = Item(id=f"WRK-{n:03d}", title=f"Item {n}", status=status)
        item["created"] = f"2026-01-01T00:00:00.{(n * 7919) % 1_000_000:06d}+00:00"
        if status in PHASES:
            item["phase"] = PHASES[status]
        if n % 3 == 0:
            item["dependencies"] = [f"WRK-{n - 1:03d}"]
        items[item["id"]] = item
    return Backlog(items, count)


def best_ms(backlog: Backlog, free: int) -> float:
    """The best of some rounds, with this many free slots and promotions left."""
    config = default_config(Path())
    wip = sum(item["status"] == "in_progress" for item in backlog.items.values())
    execution = config.execution._replace(max_wip=wip + free, max_concurrent=free)
    config = config._replace(execution=execution)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        select_actions(backlog, {}, config)
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


def main() -> int:
    slow = 0
    kinds = {"mixed": STATUSES, **{status: (status,) for status in STATUSES}}
    for name, statuses in kinds.items():
        for count, limit in LIMITS_MS.items():
            took = best_ms(make_backlog(count, statuses), free=4)
            slow += took > limit
            verdict = "ok" if took <= limit else "TOO SLOW"
            print(f"{name:11} {count:>7} items  {took:8.2f} ms  (limit {limit} ms)  {verdict}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
