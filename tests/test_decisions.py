"""The pure decisions: what to start, when to stop, what a result does to the backlog."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import backlog
import orchestrator
from backlog import Applied, Backlog, Draft, FollowUp, Item, PhaseResult, promote
from orchestrator import Action, Config, HaltReason, Promote, RunOptions, Task

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
STAMP = "2026-03-01T12:00:00+00:00"
DEFAULTS = orchestrator.default_config(Path())
RULES = orchestrator.rules_of(DEFAULTS)


def configure(text: str) -> Config:
    return orchestrator.parse_config(text.encode(), "orchestrator.toml", Path())


def limits(max_wip: int = 1, max_concurrent: int = 1) -> Config:
    """The built-in pipeline (research | prd, design, BUILD, review) with these limits."""
    execution = DEFAULTS.execution._replace(max_wip=max_wip, max_concurrent=max_concurrent)
    return DEFAULTS._replace(execution=execution)


def item(item_id: str, status: str = "new", **fields: Any) -> Item:
    known = {"id": item_id, "title": f"Title of {item_id}", "status": status}
    times = {"created": "2026-01-01T00:00:00+00:00", "updated": "2026-01-01T00:00:00+00:00"}
    return {**known, "requires_human_review": False, **times, **fields}


def a_backlog(*items: Item, last: int = 9) -> Backlog:
    return Backlog({one["id"]: one for one in items}, last)


def at(item_id: str, phase: str, **fields: Any) -> Item:
    """An item that is due for a phase of the built-in pipeline."""
    status, pool = ("scoping", "pre") if phase == "research" else ("in_progress", "main")
    return item(item_id, status, phase=phase, phase_pool=pool, **fields)


def settled(item: Item) -> Item:
    """An item with whole seconds: several changes in one act count up the microseconds."""
    return {**item, "updated": item["updated"].partition(".")[0].removesuffix("+00:00") + "+00:00"}


def task(item_id: str, phase: str, config: Config = DEFAULTS) -> Task:
    if phase == "triage":
        return Task(item_id, orchestrator.TRIAGE_PHASE, "triage")
    return Task(item_id, *orchestrator.phase_places(config.pipelines["feature"])[phase][:2])


def short(actions: Iterable[Action]) -> list[str]:
    """Actions as "promote A-1" or "build A-1"."""
    return [f"promote {a.item_id}" if isinstance(a, Promote) else f"{a.name} {a.item_id}" for a in actions]


def chosen(
    items: list[Item], config: Config = DEFAULTS, running: Iterable[Task] = (), only: Iterable[str] | None = None, target: str | None = None
) -> list[str]:
    busy = {one.item_id: one for one in running}
    some = None if only is None else frozenset(only)
    options = RunOptions(9, (target,) if target else ())
    return short(orchestrator.select_actions(options, a_backlog(*items), busy, config, some))


# ---- Selection ------------------------------------------------------------------------------------

READY = [item("A-1", "ready"), item("A-2", "ready", impact="low"), item("A-3", "ready", impact="high"), item("A-4", "ready", impact="medium")]
BY_KEYS = [
    item("A-1", "ready", impact="high", created="2026-01-03"), item("A-2", "ready", impact="high", created="2026-01-02"),
    item("A-3", "ready", priority=1), item("A-4", "ready", impact="high", priority=-1), item("A-5", "ready", impact="high", created="2026-01-02"),
]  # fmt: skip
WIP = [at("A-1", "prd"), item("A-2", "blocked", phase="prd"), item("A-3", "ready")]
POOLS = [item("A-1", created="2025-01-01"), at("A-2", "research"), at("A-3", "prd")]
BEHIND = [at("A-1", "review"), at("A-2", "build"), at("A-3", "prd"), item("A-4")]
BESIDE = [at("A-1", "build"), at("A-2", "prd"), item("A-3"), item("A-4", "ready")]
FULL_SLOTS = [at("A-1", "prd"), item("A-2", "ready")]
TARGETS = [at("A-1", "prd"), item("A-2", "ready"), at("A-3", "build"), item("A-4")]
FILTERED = [item("A-1", "ready"), item("A-2", "ready"), item("A-3"), item("A-4")]
WHOLE = [item("A-1", "ready", dependencies=["A-2"]), item("A-2"), item("A-3", "ready"), at("A-4", "prd")]
PRD, BUILD = [task("A-1", "prd")], [task("A-1", "build")]

# name: items, max_wip and max_concurrent, other arguments, what is chosen
SELECTED: dict[str, tuple[list[Item], tuple[int, int], dict[str, Any], list[str]]] = {
    "nothing": ([], (9, 9), {}, []),
    "done": ([item("A-1", "done")], (9, 9), {}, []),
    "blocked": ([item("A-1", "blocked", phase="prd", phase_pool="main")], (9, 9), {}, []),
    "in progress without a phase": ([item("A-1", "in_progress")], (9, 9), {}, []),
    "unknown pipeline": ([at("A-1", "prd", pipeline_type="nope")], (9, 9), {}, []),
    "unknown phase": ([item("A-1", "in_progress", phase="nope")], (9, 9), {}, []),
    "main phase while scoping": ([item("A-1", "scoping", phase="prd")], (9, 9), {}, []),
    "pre-phase while in progress": ([item("A-1", "in_progress", phase="research")], (9, 9), {}, []),
    "a missing pool is found by the phase": ([item("A-1", "in_progress", phase="design")], (1, 1), {}, ["design A-1"]),
    "promotions by impact": (READY, (9, 1), {}, ["promote A-3", "promote A-4", "promote A-2", "promote A-1"]),
    "by priority, impact, age, place": (BY_KEYS, (9, 1), {}, [f"promote A-{n}" for n in (3, 2, 5, 1, 4)]),
    "in progress counts": (WIP, (1, 1), {}, ["prd A-1"]),
    "blocked does not": (WIP, (2, 1), {}, ["promote A-3", "prd A-1"]),
    "two in progress": ([*WIP, at("A-4", "prd")], (2, 1), {}, ["prd A-1"]),
    "the furthest, then the oldest": (
        [at("A-1", "prd"), at("A-2", "design", created="2026-01-02"), at("A-3", "design", created="2026-01-01")],
        (9, 9), {}, ["design A-3", "design A-2", "prd A-1"],
    ),
    "priority beats progress": (
        [at("A-1", "design"), at("A-2", "prd", priority=5), item("A-3"), item("A-4", priority=1)],
        (9, 9), {}, ["prd A-2", "design A-1", "triage A-4", "triage A-3"],
    ),
    "in progress, scoping, triage": (POOLS, (9, 9), {}, ["prd A-3", "research A-2", "triage A-1"]),
    "two slots": (POOLS, (9, 2), {}, ["prd A-3", "research A-2"]),
    "a destructive phase alone": ([at("A-1", "build"), at("A-2", "prd"), item("A-3")], (9, 9), {}, ["build A-1"]),
    "with promotions": ([at("A-1", "build"), item("A-2", "ready")], (2, 9), {}, ["promote A-2", "build A-1"]),
    "nothing overtakes it": (BEHIND, (9, 9), {}, ["review A-1"]),
    "it waits": (BEHIND, (9, 9), {"running": [task("A-1", "review")]}, []),
    "it waits for a triage": (BEHIND[1:], (9, 9), {"running": [task("X-1", "triage")]}, []),
    "nothing starts beside it": (BESIDE, (9, 9), {"running": BUILD}, []),
    "full slots": (FULL_SLOTS, (9, 1), {"running": PRD}, []),
    "a free slot": (FULL_SLOTS, (9, 2), {"running": PRD}, ["promote A-2"]),
    "what runs is left out": (
        [at("A-1", "prd"), at("A-2", "prd"), item("A-3"), item("A-4")],
        (9, 9), {"running": [task("A-1", "prd"), task("A-3", "triage")]}, ["prd A-2", "triage A-4"],
    ),
    "one unmet dependency is enough": (
        [item("A-1", "ready", dependencies=["A-2", "A-3"]), item("A-2", "done"), item("A-3", "blocked")], (1, 1), {}, [],
    ),
    "who waits uses up no promotion": (
        [item("A-1", "ready", impact="high", dependencies=["A-3"]), item("A-2", "ready"), item("A-3", "blocked")],
        (1, 1), {}, ["promote A-2"],
    ),
    "a target to triage": ([item("A-0", priority=9), item("A-1")], (1, 1), {"target": "A-1"}, ["triage A-1"]),
    "a target to promote": ([item("A-0", priority=9), item("A-1", "ready")], (1, 1), {"target": "A-1"}, ["promote A-1"]),
    "a blocked target": ([item("A-0", priority=9), item("A-1", "blocked")], (1, 1), {"target": "A-1"}, []),
    "an unknown target": ([item("A-1")], (1, 1), {"target": "A-2"}, []),
    "a target ignores the limits": (TARGETS, (1, 1), {"running": PRD, "target": "A-2"}, ["promote A-2"]),
    "a new one, too": (TARGETS, (1, 1), {"running": PRD, "target": "A-4"}, ["triage A-4"]),
    "a target that runs": (TARGETS, (1, 1), {"running": PRD, "target": "A-1"}, []),
    "a destructive target waits": (TARGETS, (1, 1), {"running": PRD, "target": "A-3"}, []),
    "a target waits for a destructive phase": (TARGETS, (1, 1), {"running": [task("A-3", "build")], "target": "A-4"}, []),
    "only": (FILTERED, (9, 9), {"only": ["A-2", "A-4"]}, ["promote A-2", "triage A-4"]),
    "only nothing": (FILTERED, (9, 9), {"only": []}, []),
    "only another than the target": (FILTERED, (9, 9), {"only": ["A-1"], "target": "A-2"}, []),
    "d21 dependencies of the whole backlog": (WHOLE, (9, 9), {"only": ["A-1"]}, []),
    "d21 wip of what is matched": (WHOLE, (1, 1), {"only": ["A-3"]}, ["promote A-3"]),
    "d21 wip of what is matched is used up": (WHOLE, (1, 1), {"only": ["A-3", "A-4"]}, ["prd A-4"]),
}  # fmt: skip


@pytest.mark.parametrize(("items", "most", "arguments", "expected"), SELECTED.values(), ids=SELECTED)
def test_d21_select_actions(items: list[Item], most: tuple[int, int], arguments: dict[str, Any], expected: list[str]) -> None:
    assert chosen(items, limits(*most), **arguments) == expected


@pytest.mark.parametrize("waiting", [item("A-1", "ready"), at("A-1", "prd"), at("A-1", "research"), item("A-1")])
@pytest.mark.parametrize("target", [None, "A-1"])
def test_dependencies(waiting: Item, target: str | None) -> None:
    needs = [item("A-2", status) for status in ("blocked", "in_progress", "scoping")]
    needs += [item("A-2", "ready", dependencies=["A-2"]), item("A-2", dependencies=["A-2"])]
    for items, met in ([[item("A-2", "done")], True], [[], True], *([[one], False] for one in needs)):
        assert bool(chosen([{**waiting, "dependencies": ["A-2"]}, *items], limits(9, 9), target=target)) is met


# ---- Targets and halts ----------------------------------------------------------------------------

def test_the_current_target() -> None:
    items = {"A-1": item("A-1"), "A-2": item("A-2", "done"), "A-3": item("A-3", "blocked"), "A-4": at("A-4", "prd")}  # archived
    for targets, current in {"": None, "A-1": "A-1", "A-2 A-1": "A-1", "A-9 A-1": "A-1", "A-2 A-9": None, "A-2 A-9 A-4": "A-4", "A-3 A-1": "A-3"}.items():
        assert orchestrator.next_target(targets.split(), items, [], False) == current
    assert orchestrator.next_target(["A-1", "A-4"], items, ["A-1"], False) == "A-4"  # completed, though the snapshot is older
    assert [orchestrator.next_target(targets, items, [], True) for targets in (["A-3", "A-1"], ["A-3"])] == ["A-1", None]


WORK: tuple[Action, ...] = (task("A-1", "prd"),)


View = Callable[[], HaltReason | None]


def view(*items: Item, targets: tuple[str, ...] = (), auto_advance: bool = False, **fields: Any) -> View:
    options = RunOptions(9, targets, auto_advance=auto_advance)
    usual: dict[str, Any] = {"running": {}, "offered": WORK}
    return partial(orchestrator.halt_reason, options, {one["id"]: one for one in items}, **{**usual, **fields})


RUNNING = {"A-1": task("A-1", "prd")}
BLOCKED = item("A-2", "blocked")

# Each makes one reason hold without spoiling the others, in the order of precedence.
REASONS: dict[HaltReason, dict[str, Any]] = {
    HaltReason.SHUTDOWN_REQUESTED: {"stopping": True},
    HaltReason.CIRCUIT_BREAKER_TRIPPED: {"broken": True},
    HaltReason.TARGET_BLOCKED: {"targets": ("A-2",)},
    HaltReason.TARGET_COMPLETED: {"targets": ("A-9",)},
    HaltReason.NO_MATCHING_ITEMS: {"matched": frozenset()},
    HaltReason.FILTER_EXHAUSTED: {"matched": frozenset({"A-2"})},
    HaltReason.ALL_DONE_OR_BLOCKED: {"offered": ()},
    HaltReason.CAP_REACHED: {"used_up": True},
}
ORDER = list(HaltReason)


@pytest.mark.parametrize("first", ORDER)
def test_the_order_of_the_halt_reasons(first: HaltReason) -> None:
    for second in ORDER[ORDER.index(first) :]:
        assert view(BLOCKED, **{**REASONS[second], **REASONS[first]})() is first
    waits = first in (HaltReason.ALL_DONE_OR_BLOCKED, HaltReason.CAP_REACHED)
    found = view(BLOCKED, running=RUNNING, **REASONS[first])()
    assert found is (None if waits else first)  # those two wait for what runs


MINE: dict[str, Any] = {"matched": frozenset({"A-1", "A-9"})}  # A-9 was archived
GONE_ON: dict[str, tuple[View, HaltReason | None]] = {
    "with work": (view(item("A-1")), None),
    "a target in flight, blocked by hand": (view(item("A-1", "blocked"), running=RUNNING, targets=("A-1",)), None),
    "a target in flight, done by hand": (view(item("A-1", "done"), running=RUNNING, targets=("A-1",)), None),
    "a target in flight, deleted": (view(running=RUNNING, targets=("A-1",)), None),
    "d54 a target blocked before the run": (view(BLOCKED, targets=("A-2",)), HaltReason.TARGET_BLOCKED),
    "auto-advance": (view(BLOCKED, item("A-1"), targets=("A-2", "A-1"), auto_advance=True), None),
    "auto-advance past the last": (view(BLOCKED, targets=("A-2",), auto_advance=True), HaltReason.TARGET_COMPLETED),
    "auto-advance without targets": (view(BLOCKED, auto_advance=True), None),
    "d48 completed though the snapshot is older": (
        view(at("A-1", "review"), targets=("A-1",), completed=("A-1",)), HaltReason.TARGET_COMPLETED,
    ),
    "d22 a filter is about what it ever matched": (view(at("A-1", "prd"), **MINE), None),
    "d22 blocked": (view(item("A-1", "blocked"), **MINE), HaltReason.FILTER_EXHAUSTED),
    "d22 done": (view(item("A-1", "done"), **MINE), HaltReason.FILTER_EXHAUSTED),
    "d22 archived": (view(**MINE), HaltReason.FILTER_EXHAUSTED),
    "a match that runs": (view(item("A-1", "blocked"), running=RUNNING, **MINE), None),
    "the cap lets promotions be made": (view(offered=(Promote("A-2"), *WORK), used_up=True), None),
    "the cap": (view(offered=WORK, used_up=True), HaltReason.CAP_REACHED),
    "the cap with nothing to do": (view(offered=(), used_up=True), HaltReason.ALL_DONE_OR_BLOCKED),
}  # fmt: skip


@pytest.mark.parametrize(("seen", "reason"), GONE_ON.values(), ids=GONE_ON)
def test_d22_d48_d54_halts(seen: View, reason: HaltReason | None) -> None:
    assert seen() is reason


# What a run exits with that completed nothing and blocked nothing, completed one, blocked one, did both.
CODES: dict[HaltReason | None, tuple[int, int, int, int]] = {
    HaltReason.CIRCUIT_BREAKER_TRIPPED: (4, 4, 4, 4),
    HaltReason.TARGET_BLOCKED: (3, 3, 3, 3),
    HaltReason.TARGET_COMPLETED: (3, 0, 3, 0),
    HaltReason.NO_MATCHING_ITEMS: (0, 0, 0, 0),
    HaltReason.FILTER_EXHAUSTED: (0, 0, 3, 0),
    HaltReason.ALL_DONE_OR_BLOCKED: (0, 0, 3, 0),
    HaltReason.CAP_REACHED: (0, 0, 0, 0),
    None: (1, 1, 1, 1),
}


def test_d30_exit_codes() -> None:
    for reason, codes in CODES.items():
        found = [orchestrator.exit_code(reason, None, c, b) for c, b in (([], []), (["A-1"], []), ([], ["A-2"]), (["A-1"], ["A-2"]))]
        assert tuple(found) == codes
    for signal, code in ((2, 130), (15, 143), (1, 129), (None, 0)):
        assert orchestrator.exit_code(HaltReason.SHUTDOWN_REQUESTED, signal, [], ["A-1"]) == code


# ---- Guardrails -----------------------------------------------------------------------------------

ACCEPT = "a human has to accept it"


HUMAN = {"requires_human_review": True}
OVER = "the guardrails are exceeded by"
OBJECTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"size": "small", "complexity": "low", "risk": "low"}, ""),
    ({"size": "medium", "complexity": "medium", "risk": "low"}, ""),
    ({"impact": "high"}, ""),
    ({"size": "large"}, f"{OVER} size large (limit medium)"),
    ({"complexity": "high"}, f"{OVER} complexity high (limit medium)"),
    ({"risk": "medium"}, f"{OVER} risk medium (limit low)"),
    ({"size": "large", "risk": "high"}, f"{OVER} size large (limit medium), risk high (limit low)"),
    (HUMAN, "human review is required"),
    ({**HUMAN, "size": "large"}, f"human review is required and {OVER} size large (limit medium)"),
    ({**HUMAN, "size": "large", "guardrail_override": True}, ""),
]


def test_guardrails() -> None:
    for fields, objection in OBJECTIONS:
        expected = f"{objection}; {ACCEPT}" if objection else ""
        assert backlog.guardrail_objection(item("A-1", **fields), RULES.limits) == expected


def test_only_what_has_risen_counts_against_work_in_progress() -> None:
    objected: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"risk": "medium"}), ({"risk": "low"}, {"risk": "medium"}), ({"risk": "medium"}, {"risk": "high"}), ({}, HUMAN)
    ]
    accepted: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"risk": "medium"}, {"risk": "medium"}), ({"risk": "high"}, {"risk": "medium"}), ({"size": "small"}, {"size": "medium"}), (HUMAN, HUMAN)
    ]
    for before, after in objected + accepted:
        found = backlog.guardrail_objection(item("A-1", **after), RULES.limits, before=item("A-1", **before))
        assert bool(found) is ((before, after) in objected)


# ---- Results of phases ----------------------------------------------------------------------------

def result(phase: str, code: str = "phase_complete", **fields: Any) -> PhaseResult:
    return PhaseResult("A-1", phase, code, f"{phase} summary", **fields)  # type: ignore[arg-type]


class Case:
    """A backlog, the result of a task on A-1 applied to it, and what came out."""

    def __init__(
        self, started: Item, reported: PhaseResult, *others: Item, config: Config = DEFAULTS, edited: Item | None = None, removed: bool = False
    ) -> None:
        present = [] if removed else [edited or started]
        self.draft = Draft(a_backlog(*present, *others))
        applied = backlog.apply_result(self.draft, started, reported, orchestrator.rules_of(config), NOW)
        self.applied = applied._replace(item=settled(applied.item))

    @property
    def item(self) -> Item:
        return settled(self.draft.items["A-1"])

    def entry(self, phase: str, outcome: str, summary: str) -> str:
        return backlog.worklog_entry(NOW, "A-1", "Title of A-1", phase, outcome, summary)


LOOK_THINK = configure('[pipelines.feature]\npre_phases = [{name="look"}, {name="think"}]\nphases = [{name="do"}]')
NO_PRE_PHASES = configure('[pipelines.feature]\nphases = [{name="do"}]')
HIGH = {"size": "large", "complexity": "medium", "risk": "high", "impact": "medium"}
LOW = {"size": "small", "complexity": "high", "risk": "low", "impact": "low"}

# name: item, result, what the item is afterwards (None: it lacks the key), config, edited meanwhile
LED: dict[str, tuple[Item, PhaseResult, dict[str, Any], Config, Item | None]] = {
    name: (*row, *(DEFAULTS, None)[len(row) - 3 :])  # type: ignore[misc]
    for name, row in {
        "prd": (
            at("A-1", "prd", attempts=2, unblock_context="notes"), result("prd"),
            {"phase": "design", "phase_pool": "main", "status": "in_progress", "attempts": None, "unblock_context": None, "updated": STAMP},
        ),
        "a subphase repeats the phase": (
            at("A-1", "build", attempts=1, unblock_context="notes"), result("build", "subphase_complete", ratings={"risk": "low"}),
            {"phase": "build", "status": "in_progress", "attempts": None, "unblock_context": "notes", "risk": "low"},
        ),
        "design": (at("A-1", "design"), result("design"), {"phase": "build", "phase_pool": "main"}),
        "build": (at("A-1", "build"), result("build"), {"phase": "review", "phase_pool": "main"}),
        "pre-phases": (
            item("A-1", "scoping", phase="look", phase_pool="pre"), result("look"),
            {"status": "scoping", "phase": "think", "phase_pool": "pre"}, LOOK_THINK,
        ),
        "a missing pool": (item("A-1", "in_progress", phase="prd"), result("prd"), {"phase": "design", "phase_pool": "main"}),
        "the last pre-phase": (at("A-1", "research", size="small"), result("research"), {"status": "ready", "phase": None, "phase_pool": None}),
        "d18 the kind of a block": (at("A-1", "prd"), result("prd", "blocked", block_type="clarification"), {"blocked_type": "clarification"}),
        "a block without any text": (at("A-1", "prd"), PhaseResult("A-1", "prd", "blocked", ""), {"blocked_reason": "prd gave no reason"}),
        "a phase that is no more": (
            at("A-1", "prd"), result("prd"), {"blocked_reason": "pipeline 'docs' has no phase 'prd' to go on from"},
            DEFAULTS, at("A-1", "prd", pipeline_type="docs"),
        ),
        "ratings are merged": (
            at("A-1", "prd", size="small", impact="low"), result("prd", ratings={"impact": "high", "risk": "low"}),
            {"size": "small", "impact": "high", "risk": "low"},
        ),
        "a rating is a floor in triage": (item("A-1", **HIGH), result("triage", ratings=LOW), {**HIGH, "complexity": "high"}),
        "a rating is a floor in a pre-phase": (at("A-1", "research", **HIGH), result("research", ratings=LOW), {**HIGH, "complexity": "high"}),
        "a rating is a floor in a phase": (at("A-1", "prd", **HIGH), result("prd", ratings=LOW), {**HIGH, "complexity": "high"}),
        "a rating by hand is a floor": (
            at("A-1", "prd"), result("prd", ratings={"size": "small"}), {"size": "medium"}, DEFAULTS, at("A-1", "prd", size="medium"),
        ),
        "edits of other keys stay": (
            at("A-1", "prd"), result("prd"), {"tags": ["x"], "priority": 3, "dependencies": ["A-2"]}, DEFAULTS,
            at("A-1", "prd", tags=["x"], priority=3, dependencies=["A-2"]),
        ),
        "d20 the pre-phase is not repeated": (
            at("A-1", "research", size="large"), result("research"),
            {"blocked_from_status": "ready", "phase": None, "blocked_type": "decision", "blocked_reason": f"{OVER} size large (limit medium); {ACCEPT}"},
        ),
        "a pre-phase that rates it high": (
            at("A-1", "research"), result("research", ratings={"complexity": "high"}), {"blocked_reason": f"{OVER} complexity high (limit medium); {ACCEPT}"},
        ),
        "d16 triage on its way to ready": (
            item("A-1"), result("triage", ratings={"size": "small", "complexity": "high"}),
            {"blocked_reason": f"{OVER} complexity high (limit medium); {ACCEPT}", "blocked_from_status": "ready"},
        ),
        "triage that rates it risky": (item("A-1"), result("triage", ratings={"risk": "medium"}), {"blocked_reason": f"{OVER} risk medium (limit low); {ACCEPT}"}),
        "triage of what needs a human": (item("A-1", requires_human_review=True), result("triage"), {"blocked_reason": f"human review is required; {ACCEPT}"}),
        "d16 triage without pre-phases": (item("A-1"), result("triage", ratings={"size": "large"}), {"blocked_from_status": "ready"}, NO_PRE_PHASES),
        "a blocked triage": (
            item("A-1"), result("triage", "blocked", context="not needed", block_type="decision"),
            {"blocked_from_status": "new", "blocked_reason": "not needed", "blocked_type": "decision"},
        ),
        "d20 an override lets it pass": (at("A-1", "research", size="large", guardrail_override=True), result("research"), {"status": "ready"}),
        "d16 raised and complete": (
            at("A-1", "prd", risk="low"), result("prd", ratings={"risk": "high"}),
            {"blocked_reason": f"{OVER} risk high (limit low); {ACCEPT}", "blocked_from_status": "in_progress", "phase": "design"},
        ),
        "d16 raised and not complete": (
            at("A-1", "prd", risk="low"), result("prd", "subphase_complete", ratings={"risk": "high"}), {"status": "blocked", "phase": "prd"},
        ),
        "d16 accepted before": (at("A-1", "prd", risk="high"), result("prd", ratings={"risk": "high"}), {"phase": "design", "status": "in_progress"}),
        "raised with an override": (
            at("A-1", "prd", guardrail_override=True), result("prd", ratings={"size": "large"}), {"phase": "design", "status": "in_progress"},
        ),
        "a phase asks for a human": (at("A-1", "prd"), result("prd", requires_human_review=True), {"blocked_reason": f"human review is required; {ACCEPT}"}),
        "and may not waive one": (
            at("A-1", "prd", requires_human_review=True), result("prd", requires_human_review=False),
            {"status": "in_progress", "requires_human_review": True},
        ),
        "triage without pre-phases": (item("A-1"), result("triage", ratings={"size": "medium"}), {"status": "ready"}, NO_PRE_PHASES),
        "triage of what is small": (item("A-1", attempts=1), result("triage", ratings={"size": "small"}), {"status": "ready", "attempts": None, "updated": STAMP}),
        "triage of what is safe": (item("A-1"), result("triage", ratings={"risk": "low"}), {"status": "scoping", "phase": "research", "phase_pool": "pre"}),
        "d17 triage asks for a human": (
            item("A-1"), result("triage", ratings={"size": "large"}, requires_human_review=True), {"status": "blocked", "requires_human_review": True},
        ),
        "an override survives triage": (
            item("A-1", guardrail_override=True), result("triage", ratings={"size": "large"}), {"status": "ready", "guardrail_override": True}, NO_PRE_PHASES,
        ),
        "d19 notes last through triage": (item("A-1", unblock_context="do it so"), result("triage"), {"unblock_context": "do it so"}),
        "d19 and one phase": (at("A-1", "research", unblock_context="do it so"), result("research"), {"unblock_context": None}),
        "d13 a triage that failed": (item("A-1"), result("triage", "failed"), {"status": "blocked"}),
        "d13 half a triage": (item("A-1"), result("triage", "subphase_complete"), {"status": "blocked"}),
        "an unknown pipeline": (
            item("A-1"), result("triage", pipeline_type="blog"),
            {"blocked_reason": "unknown pipeline type 'blog'; built-in defaults has: feature", "pipeline_type": None},
        ),
        "an unknown pipeline of its own": (item("A-1", pipeline_type="blog"), result("triage"), {"status": "blocked"}),
        "corrected by triage": (
            item("A-1", pipeline_type="blog"), result("triage", pipeline_type="feature"), {"status": "scoping", "pipeline_type": "feature"},
        ),
        "d36 a failed triage asks nothing": (item("A-1"), result("triage", "failed", duplicates=("A-3",)), {"blocked_reason": "triage summary"}),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(("started", "reported", "expected", "config", "edited"), LED.values(), ids=LED)
def test_d13_d16_d17_d18_d19_d20_d36_what_a_result_makes_of_an_item(
    started: Item, reported: PhaseResult, expected: dict[str, Any], config: Config, edited: Item | None
) -> None:
    case = Case(started, reported, config=config, edited=edited)
    assert {key: case.item.get(key) for key in expected} == expected
    again = "again" if reported.result == "subphase_complete" else "advanced"
    assert case.applied.state == ("blocked" if case.item["status"] == "blocked" else again)
    assert case.applied.item == case.item
    assert case.applied.reason == case.item.get("blocked_reason", "")
    assert case.applied.warnings == ()


def test_the_last_phase_completes_and_archives_in_one_draft() -> None:
    started = at("A-1", "review", description={"context": "c"})
    case = Case(started, result("review"), item("A-2", "ready", dependencies=["A-1"]))
    assert case.draft.items == {"A-2": item("A-2", "ready", updated=STAMP)}
    final = case.applied.item
    assert (final["id"], final["status"], final["phase"]) == ("A-1", "done", "review")
    entries = case.entry("review", "Complete", "review summary") + backlog.archive_entry(NOW, final)
    assert case.applied == Applied("completed", final, worklog=entries)
    assert "- **Status:** Done\n- **Phase:** review\n" in case.applied.worklog


@pytest.mark.parametrize(("code", "outcome"), [("blocked", "Blocked"), ("failed", "Failed")])
@pytest.mark.parametrize(("context", "reason"), [("the details", "the details"), (None, "prd summary"), ("", "prd summary")])
def test_a_blocked_or_failed_result_blocks_with_context_else_summary(code: str, outcome: str, context: str | None, reason: str) -> None:
    case = Case(at("A-1", "prd", attempts=2), result("prd", code, context=context))
    expected = at("A-1", "prd", blocked_from_status="in_progress", blocked_reason=reason, updated=STAMP)
    expected["status"] = "blocked"
    assert case.item == expected
    assert case.applied == Applied("blocked", expected, reason, worklog=case.entry("prd", outcome, reason))


# ---- Follow-ups -----------------------------------------------------------------------------------

FOLLOW_UPS = (FollowUp("Tidy up", "it is a mess", "small", "low"), FollowUp("More tests"))


@pytest.mark.parametrize("code", ["phase_complete", "subphase_complete", "blocked", "failed"])
@pytest.mark.parametrize("phase", ["prd", "review", "research", "triage"])
def test_d35_every_kind_of_result_brings_its_follow_ups(code: str, phase: str) -> None:
    started = item("A-1") if phase == "triage" else at("A-1", phase)
    case = Case(started, result(phase, code, follow_ups=FOLLOW_UPS, ratings={"impact": "high"}, requires_human_review=True))
    assert case.applied.follow_ups == ("WRK-010", "WRK-011")
    tidy, tests = case.draft.items["WRK-010"], case.draft.items["WRK-011"]
    assert (tidy["title"], tidy["status"], tidy["origin"]) == ("Tidy up", "new", f"A-1/{phase}")
    assert (tidy["size"], tidy["risk"], tidy["description"]["context"]) == ("small", "low", "it is a mess")
    assert (tests["title"], "size" in tests) == ("More tests", False)
    assert (case.applied.item["impact"], case.applied.item["requires_human_review"]) == ("high", True)


def test_d35_follow_ups_that_are_there_already_are_left_out_with_a_warning() -> None:
    case = Case(at("A-1", "prd"), result("prd", follow_ups=FOLLOW_UPS), item("A-2", title="tidy  UP!"))
    assert case.applied.follow_ups == ("WRK-010",)
    [warning] = case.applied.warnings
    assert "Tidy up" in warning
    assert "A-2" in warning


# ---- What the operator did meanwhile --------------------------------------------------------------

@pytest.mark.parametrize(
    ("code", "outcome"),
    [("phase_complete", "Complete"), ("subphase_complete", "Subphase Complete"), ("blocked", "Blocked"), ("failed", "Failed")],
)
def test_an_item_that_vanished_is_recorded_and_dropped(code: str, outcome: str) -> None:
    started = at("A-1", "prd")
    case = Case(started, result("prd", code, follow_ups=FOLLOW_UPS[:1]), item("A-2"), removed=True)
    assert set(case.draft.items) == {"A-2", "WRK-010"}  # what it found out is not lost
    reason = "the item left the backlog while the phase ran"
    entry = case.entry("prd", outcome, f"prd summary ({reason})")
    assert case.applied == Applied("dropped", started, reason, ("WRK-010",), worklog=entry)


def test_failed_attempts_are_counted_on_the_item_if_it_is_there() -> None:
    draft = Draft(a_backlog(at("A-1", "prd")))
    assert [backlog.charge_attempt(draft, at("A-1", "prd"), NOW) for _ in range(2)] == [1, 2]
    assert settled(draft.items["A-1"]) == at("A-1", "prd", attempts=2, updated=STAMP)
    draft = Draft(a_backlog())
    assert backlog.charge_attempt(draft, at("A-1", "prd", attempts=1), NOW) == 2
    assert draft.items == {}


# ---- Triage ---------------------------------------------------------------------------------------

def test_what_needs_a_human_is_stopped_before_a_pre_phase() -> None:
    """Accepted, it goes on with the pre-phases; the triage is not repeated."""
    case = Case(item("A-1", size="large", risk="high"), result("triage", ratings={"size": "small", "risk": "low"}))
    assert (case.applied.state, case.item["blocked_reason"]) == ("blocked", f"{OVER} size large (limit medium), risk high (limit low); {ACCEPT}")
    backlog.unblock(case.draft, "A-1", NOW, override=True)
    assert short(orchestrator.select_actions(RunOptions(9), case.draft.backlog(), {}, DEFAULTS)) == ["research A-1"]
    assert Case(case.draft.items["A-1"], result("research")).item["status"] == "ready"


FULL = {"context": "c", "problem": "p", "solution": "s", "impact": "i", "sizing_rationale": "r"}


def test_triage_takes_the_description_field_by_field() -> None:
    cases: list[tuple[dict[str, str] | None, dict[str, str], dict[str, str] | None]] = [
        (None, FULL, FULL), (None, {}, None), (None, dict.fromkeys(FULL, ""), None),
        (None, {"problem": "p", "impact": "i"}, {**dict.fromkeys(FULL, ""), "problem": "p", "impact": "i"}),
        (FULL, {"problem": "new"}, {**FULL, "problem": "new"}), (FULL, {"context": ""}, FULL),
    ]  # fmt: skip
    for old, given, stored in cases:
        started = item("A-1", description=old) if old else item("A-1")
        assert Case(started, result("triage", description=given)).item.get("description") == stored


# ---- Duplicates -----------------------------------------------------------------------------------

QUESTION = "it seems to be a duplicate of A-3 (Title of A-3); if it is, `close` it, else `unblock` it with a note"


def test_a_suspected_duplicate_blocks_with_that_question() -> None:
    reported = result("triage", duplicates=("A-3",), description={"problem": "p"})
    other = item("A-3", "in_progress", dependencies=["A-1"])
    case = Case(item("A-1"), reported, other)
    assert case.draft.items["A-3"] == other
    assert (case.item["status"], case.item["blocked_from_status"]) == ("blocked", "new")
    assert (case.item["blocked_reason"], case.item["blocked_type"]) == (QUESTION, "decision")
    assert case.item["description"]["problem"] == "p"
    told = case.entry("triage", "Complete", "triage summary") + case.entry("triage", "Blocked", QUESTION)
    assert case.applied.worklog == told
    reported = result("triage", "blocked", duplicates=("A-3",), context="why?", block_type="clarification")
    case = Case(item("A-1"), reported, item("A-3", "done"))  # the same of one that blocks
    assert (case.item["blocked_reason"], case.item["blocked_type"]) == (f"why?; {QUESTION}", "clarification")


@pytest.mark.parametrize("duplicate", ["A-1", "A-9"])
def test_a_duplicate_that_is_not_there_is_a_warning(duplicate: str) -> None:
    case = Case(item("A-1"), result("triage", duplicates=(duplicate,)))
    assert case.applied.state == "advanced"
    assert case.applied.warnings == (f"A-1: there is no other item {duplicate} that it could repeat",)


# ---- Promotion and repair -------------------------------------------------------------------------

def test_d33_promotion_is_one_edit() -> None:
    draft = Draft(a_backlog(item("A-1", "ready", attempts=1, unblock_context="notes")))
    applied = promote(draft, "A-1", RULES, NOW)
    expected = at("A-1", "prd", unblock_context="notes", updated=STAMP)
    assert settled(draft.items["A-1"]) == expected
    assert applied == Applied("advanced", draft.items["A-1"])


def test_d16_promotion_checks_guardrails_and_whether_it_is_ready() -> None:
    """An unblocked item comes back as ready without having been checked."""
    risky = {"size": "large", "requires_human_review": True}
    states = [("blocked", {"size": "large"}), ("blocked", {"requires_human_review": True}), ("advanced", {**risky, "guardrail_override": True}), ("advanced", {"size": "medium"})]
    for state, fields in states:
        assert promote(Draft(a_backlog(item("A-1", "ready", **fields))), "A-1", RULES, NOW).state == state
    for items in ([], [item("A-1")], [at("A-1", "prd")]):  # it is not ready any more
        draft = Draft(a_backlog(*items))
        applied = promote(draft, "A-1", RULES, NOW)
        assert (applied.state, applied.item["id"]) == ("dropped", "A-1")
        assert draft.items == {one["id"]: one for one in items}


def repaired(*items: Item, config: Config = DEFAULTS) -> tuple[dict[str, Item], list[str]]:
    draft = Draft(a_backlog(*items))
    messages = backlog.repair_items(draft, orchestrator.rules_of(config), NOW)
    return draft.items, messages


def test_repair_leaves_healthy_items_alone() -> None:
    healthy = [
        item("A-1"),
        item("A-2", "new", pipeline_type="nope"),
        item("A-3", "done", pipeline_type="nope"),
        item("A-4", "blocked", pipeline_type="nope"),
        item("A-5", "ready", dependencies=["A-1"]),
        at("A-6", "prd"),
    ]
    assert repaired(*healthy) == ({one["id"]: one for one in healthy}, [])


def test_d23_active_items_without_a_phase_get_the_first_one() -> None:
    items, messages = repaired(item("A-1", "scoping"), item("A-2", "in_progress"))
    assert items == {"A-1": at("A-1", "research", updated=STAMP), "A-2": at("A-2", "prd", updated=STAMP)}
    assert messages == ["A-1: was scoping without a phase; starts with research", "A-2: was in_progress without a phase; starts with prd"]


def test_d23_scoping_without_pre_phases_is_ready_unless_guardrails_object() -> None:
    items, messages = repaired(item("A-1", "scoping"), item("A-2", "scoping", size="large"), config=NO_PRE_PHASES)
    assert [(i["status"], i.get("blocked_from_status")) for i in items.values()] == [("ready", None), ("blocked", "ready")]
    assert messages[0] == "A-1: was scoping without a phase; feature has no pre-phases, so it is ready"
    assert messages[1].startswith("A-2: was scoping without a phase; blocked: the guardrails are exceeded by size large")


@pytest.mark.parametrize("status", ["scoping", "ready", "in_progress"])
def test_d24_unknown_pipelines_block_the_item_not_the_run(status: str) -> None:
    items, messages = repaired(item("A-1", status, pipeline_type="nope"), at("A-2", "prd"))
    reason = "unknown pipeline type 'nope'; built-in defaults has: feature"
    assert (items["A-1"]["status"], items["A-1"]["blocked_reason"]) == ("blocked", reason)
    assert messages == [f"A-1: blocked: {reason}"]


def test_d49_dependencies_on_finished_items_are_pruned_by_id_and_typing_errors_are_not() -> None:
    items, messages = repaired(
        item("WRK-005", dependencies=["WRK-001", "WRK-003", "WRK-999", "WRK-006"]),
        item("WRK-006", "blocked", dependencies=["WRK-002"]),
    )
    assert items["WRK-005"]["dependencies"] == ["WRK-999", "WRK-006"]
    assert "dependencies" not in items["WRK-006"]
    assert messages == [
        "WRK-005: dropped its dependencies on finished items: WRK-001, WRK-003",
        "WRK-006: dropped its dependencies on finished items: WRK-002",
    ]


@pytest.mark.parametrize("other", ["OTHER-999", "WRK-2026112801", "WRK-004"])
@pytest.mark.parametrize("need", ["WRK-010", "OTHER-1000", "WRK-04"])
def test_a_dependency_on_what_is_still_to_be_written_stays_whatever_is_imported(other: str, need: str) -> None:
    items, messages = repaired(item("WRK-005", dependencies=[need]), item(other))
    assert (items["WRK-005"]["dependencies"], messages) == ([need], [])
