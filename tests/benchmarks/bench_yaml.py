"""Time the YAML half of backlog.py, side by side with json and, if installed, PyYAML's C code.

    python tests/benchmarks/bench_yaml.py [--items 100,1000,10000] [--rounds 7]

The contestants run in turn, so that a busy neighbour slows all of them; the figures are medians
in milliseconds, "x json" and "x PyYAML" say how many times as fast as that one is (below 1:
slower). All loads are given bytes, as a file holds them. The data is synthetic, in the shape of a
real backlog: about 18 lines per item, a quarter with a structured description, some of it in
literal blocks.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from backlog import Document, parse_yaml, render_yaml  # noqa: E402

WORDS = ["add", "remove", "retry", "commit", "state", "when", "the", "agent", "halts", "before", "saving", "its", "result", "to", "disk", "and", "log", "a", "warning", "if", "backlog", "item", "phase", "is", "missing", "from", "pipeline", "config,", "see", "`run_scheduler()`", "in", "scheduler.rs", "or", "docs", "(part", "2)", "for", "more;", "naïve", "→", "robust", "handling", "of", "timeouts"]


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high))).rstrip(":")


def description(rng: random.Random) -> dict[str, object]:
    made: dict[str, object] = {
        key: sentence(rng, 10, 60) for key in ("context", "problem", "solution", "impact")
    }
    made["sizing_rationale"] = "" if rng.random() < 0.3 else sentence(rng, 8, 30)
    if rng.random() < 0.4:
        made["problem"] = "\n".join(f"{n}. {sentence(rng, 5, 12)}" for n in range(1, 4))
    return made


def item(rng: random.Random, number: int) -> dict[str, object]:
    stamp = f"2026-02-{rng.randint(1, 28):02}T{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:33"
    made: dict[str, object] = {
        "id": f"WRK-{number:03}",
        "title": sentence(rng, 5, 12),
        "status": rng.choice(("new", "scoping", "ready", "in_progress", "blocked")),
        "phase": rng.choice(("prd", "research", "design", "spec", "build", "review")),
    }
    for key in ("size", "complexity", "risk", "impact"):
        made[key] = rng.choice(("small", "medium", "large"))
    made["requires_human_review"] = rng.random() < 0.05
    made["origin"] = f"WRK-{rng.randint(1, 99):03}/review"
    if rng.random() < 0.25:
        made["blocked_from_status"] = "in_progress"
        made["blocked_reason"] = "Phase failed: " + sentence(rng, 10, 25)
    if rng.random() < 0.3:
        made["dependencies"] = [f"WRK-{rng.randint(1, number):03}" for _ in range(2)]
    made["created"] = f"{stamp}.{rng.randint(0, 10**9 - 1):09}+00:00"
    made["updated"] = f"{stamp}.{rng.randint(0, 10**9 - 1):09}+00:00"
    made["pipeline_type"] = "feature"
    if rng.random() < 0.25:
        made["description"] = description(rng)
    made["phase_pool"] = "main"
    return made


def backlog(count: int) -> dict[str, object]:
    rng = random.Random(count)
    items = [item(rng, number) for number in range(1, count + 1)]
    return {"schema_version": 3, "items": items, "next_item_id": count}


def save_one(data: bytes, where: Path) -> Callable[[], object]:
    """A save of one changed item: edit, read back, join, encode, write, fsync, rename."""
    document = Document.parse(data, "bench")
    index = len(document.items) // 2
    turn = iter(range(10**9))

    def save() -> None:
        stamp = f"2026-03-01T00:00:00.{next(turn):09}+00:00"
        nonlocal document
        document = document.with_item(index, {"status": "ready", "updated": stamp})
        temporary = where.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(document.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(where)

    return save


def contestants(count: int, where: Path) -> dict[str, Callable[[], object]]:
    value = backlog(count)
    text = render_yaml(value)
    data, as_json = text.encode(), json.dumps(value).encode()
    assert parse_yaml(data) == value
    print(f"{count} items: {text.count(chr(10))} lines, {len(data) / 1e6:.2f} MB")
    racers: dict[str, Callable[[], object]] = {
        "json load": lambda: json.loads(as_json),
        "load": lambda: parse_yaml(data),
        "load as Document": lambda: Document.parse(data, "bench"),
        "json dump": lambda: json.dumps(value, indent=1),
        "dump": lambda: render_yaml(value),
        "save one": save_one(data, where / "BACKLOG.yaml"),
    }
    try:
        import yaml
    except ImportError:
        print("PyYAML is not installed: only compared with json")
        return racers
    loader, dumper = yaml.CSafeLoader, yaml.CSafeDumper
    racers["PyYAML load"] = lambda: yaml.load(text, loader)
    racers["PyYAML dump"] = lambda: yaml.dump(value, Dumper=dumper, sort_keys=False)
    return racers


def measure(racers: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, over rounds in which all run in turn."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    for _ in range(rounds):
        for name, run in racers.items():
            gc.collect()
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1000)
    return {name: statistics.median(each) for name, each in times.items()}


def memory(count: int) -> tuple[float, float]:
    """Megabytes at the peak of `parse_yaml` and of `json.loads`, on the same data."""
    value = backlog(count)
    data, as_json = render_yaml(value).encode(), json.dumps(value).encode()
    peaks = []
    for load in (lambda: parse_yaml(data), lambda: json.loads(as_json)):
        gc.collect()
        tracemalloc.start()
        kept = load()
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
        del kept
    return peaks[0], peaks[1]


def import_cost(rounds: int) -> tuple[float, float]:
    """Milliseconds that `import backlog` takes beyond `import re`: the median, and the least."""
    code = (
        "import sys, time, re; sys.path.insert(0, sys.argv[1]); t = time.perf_counter();"
        "import backlog; print((time.perf_counter() - t) * 1000)"
    )
    with tempfile.TemporaryDirectory() as cache:
        argv = [sys.executable, "-E", "-S", "-X", f"pycache_prefix={cache}", "-c", code, str(ROOT)]
        took = [
            float(subprocess.run(argv, capture_output=True, check=True).stdout)
            for _ in range(rounds + 1)
        ]
    del took[0]  # it compiles
    return statistics.median(took), min(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", default="100,1000,10000")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    counts = [int(count) for count in args.items.split(",")]
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            medians = measure(contestants(count, Path(folder)), args.rounds)
        print(f"{'':18}{'ms':>10}{'x json':>10}{'x PyYAML':>10}")
        for name, took in medians.items():
            kind = "load" if "load" in name else "dump"
            peers = [medians[f"json {kind}"], medians.get(f"PyYAML {kind}", 0.0)]
            ratios = "".join(f"{peer / took:10.2f}" if peer else f"{'-':>10}" for peer in peers)
            print(f"{name:18}{took:10.2f}{ratios}")
        print(f"save one takes {medians['save one'] / medians['json load']:.2f} of a json load\n")
    ours, theirs = memory(max(counts))
    print(f"peak memory of a load: {ours:.0f} MB, {ours / theirs:.2f} of json's {theirs:.0f} MB")
    usual, least = import_cost(max(args.rounds, 20))
    print(f"import backlog: {usual:.1f} ms beyond re (the quickest of all: {least:.1f} ms)")


if __name__ == "__main__":
    main()
