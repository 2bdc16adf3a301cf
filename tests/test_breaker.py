"""Usage limits and failing APIs: who rests, until when, across restarts, and who works meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from backlog import worklog_entry
from orchestrator import (
    AgentOutcome,
    AgentPause,
    Config,
    Execution,
    Journal,
    LiveLine,
    Phase,
    Progress,
    RunOptions,
    Session,
    Task,
    limit_ends,
    pause_after,
)

NOW = 1_000_000.0
DAY = 86400.0

# ---- How long ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reset", "strikes", "ends"),
    [
        (NOW + 3600, 1, 3600),
        (NOW + 3600, 5, 3600),
        (NOW - 5, 1, 60),  # a limit that outlives its announced reset must not spin
        (0.0, 1, 60),
        (NOW + 7 * DAY, 1, 7 * DAY),  # weekly limits exist
        (NOW * 1000, 1, 8 * DAY),  # milliseconds by mistake
        (None, 1, 900),
        (None, 2, 1800),
        (None, 3, 3600),
        (None, 4, 7200),
        (None, 400, 7200),
    ],
)
def test_a_limit_ends_at_its_reset_within_bounds(reset: float | None, strikes: int, ends: float) -> None:
    assert limit_ends(reset, strikes, NOW) - NOW == ends


def refused(kind: Any = "limited", until: float | None = None, seconds: float = 2.0) -> AgentOutcome:
    return AgentOutcome(kind, detail=f"claude: {kind}", until=until, seconds=seconds)


def test_failed_probes_rest_longer_but_attempts_under_way_do_not_count() -> None:
    config = Config(pipelines={}, execution=Execution(retry_delay_seconds=5))
    first = pause_after(refused(), "claude", None, config, NOW)
    neighbour = pause_after(refused(seconds=300), "claude", first, config, NOW + 60)
    probe = pause_after(refused(), "claude", neighbour, config, neighbour.until + 2)

    assert first == AgentPause("claude", NOW + 900, 1, "claude: limited")
    assert neighbour == first._replace(until=NOW + 960)
    assert probe == first._replace(until=neighbour.until + 2 + 1800, strikes=2)


def test_a_failing_api_is_tried_again_after_the_retry_delay() -> None:
    config = Config(pipelines={}, execution=Execution(retry_delay_seconds=5))
    waits, pause, now = [], None, NOW
    for _ in range(8):
        pause = pause_after(refused("transient"), "claude", pause, config, now)
        waits.append(pause.until - now)
        now = pause.until + 2  # the probe starts at once and takes two seconds

    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]
    assert pause
    assert pause.strikes == 8


# ---- In a run ------------------------------------------------------------------------------------

FAKE_CLAUDE = r"""#!/bin/sh
# Refuses as often as there are files in `refusals`, each an event; then does the work.
# A file is taken by renaming it, so of two agents at once each gets its own.
here=$(dirname "$0")
cat > /dev/null
printf '%s %s %s\n' "$ORCHESTRATOR_ITEM_ID" "$ORCHESTRATOR_PHASE" "$ORCHESTRATOR_ATTEMPT" >> "$here/claude.log"
for event in "$here"/refusals/*; do
    if mv "$event" "$here/taken.$$" 2> /dev/null; then
        cat "$here/taken.$$"
        exit 1
    fi
done
echo '{"type":"result","is_error":false,"result":"Done","total_cost_usd":0.5,"usage":{"input_tokens":10,"output_tokens":1}}'
printf '{"item_id":"%s","phase":"%s","result":"phase_complete","summary":"ok"}' "$ORCHESTRATOR_ITEM_ID" "$ORCHESTRATOR_PHASE" > "$ORCHESTRATOR_RESULT_PATH"
"""


def limit(reset: float | None = None) -> dict[str, object]:
    return {"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": reset, "rateLimitType": "five_hour"}}


OVERLOADED = {"type": "result", "subtype": "success", "is_error": True, "api_error_status": 529, "result": "API Error: 529"}


@pytest.fixture
def claude(project: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A project whose agent is a `claude` that refuses with the given events first.

    Returns a function that sets them; called without any it returns what the agent was asked for.
    """
    fake, log, refusals = (project.outside / name for name in ("claude", "claude.log", "refusals"))
    fake.write_text(FAKE_CLAUDE)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{project.outside}:{os.environ['PATH']}")
    monkeypatch.setenv("IS_SANDBOX", "1")

    def refuse(*events: object) -> list[str]:
        for number, event in enumerate(events):
            (refusals / f"{number:02}").write_text(json.dumps(event) + "\n")
        return log.read_text().splitlines() if log.exists() else []

    refusals.mkdir()
    return refuse


def configure(project: Any, execution: str = "", phases: str = '{ name = "plan" }', agent: str = "") -> None:
    (project.root / "orchestrator.toml").write_text(
        f'[agent]\ncli = "claude"\n{agent}\n[execution]\nretry_delay_seconds = 0\n{execution}\n'
        f"[pipelines.feature]\nphases = [{phases}]\n"
    )
    project.commit_all()


WAIT = 'on_usage_limit = "wait"'


class Clock:
    """A clock for the ledger: a minute passes whenever somebody looks."""

    def __init__(self) -> None:
        self.seconds = NOW

    def __call__(self) -> datetime:
        self.seconds += 60
        return datetime.fromtimestamp(self.seconds, UTC)


def run_by(clock: Clock, project: Any, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A run in this process, by another clock."""
    monkeypatch.setattr(orchestrator.Scheduler, "POLL_S", 0.01)
    space = orchestrator.open_workspace(project.root, None)
    with space.run_lock("run test"):
        ledger = orchestrator.begin_run(space, "test", allow_dirty=False)
        ledger.clock = clock
        session = Session(ledger, RunOptions(cap=10), LiveLine(enabled=False))
        asyncio.run(session.run())
    return session


def journal(project: Any) -> Journal:
    found = Journal.read(project.root / ".git/orchestrator/run.json")
    assert found is not None
    return found


@pytest.mark.slow
def test_wait_lets_one_probe_through_at_the_reset(
    project: Any, claude: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two items may run at once; the limit is hit twice, then it is over."""
    configure(project, f"{WAIT}\nmax_concurrent = 2\nmax_wip = 2\nmax_retries = 0")
    project.backlog(*(f"WRK-00{n} in_progress phase=plan phase_pool=main" for n in (1, 2)))
    project.commit_all()
    reset = NOW + 5 * 3600
    claude(limit(reset), limit(reset), limit())  # both refused, then the probe is
    orchestrator.log().propagate = True
    clock = Clock()

    with caplog.at_level("INFO", "orchestrator"):
        session = run_by(clock, project, monkeypatch)

    assert sorted(claude()[:2]) == ["WRK-001 plan 1", "WRK-002 plan 1"]
    assert claude()[2] == claude()[3] == "WRK-001 plan 1"  # one alone, and no attempt was charged
    assert sorted(claude()[3:]) == ["WRK-001 plan 1", "WRK-002 plan 1"]
    assert session.reason == orchestrator.HaltReason.ALL_DONE_OR_BLOCKED
    assert sorted(session.scheduler.totals.completed) == ["WRK-001", "WRK-002"]
    assert session.scheduler.totals.phases == 2
    assert clock.seconds > reset + 1800  # the second refusal named no reset
    assert journal(project).pauses == {}
    text = caplog.text
    assert text.count("claude rests for") >= 4  # halves: 5 h, 2 h 30, 1 h 15 …
    assert "claude: usage limit reached (five_hour); resets at 1970-01-12T18:46:40+00:00; claude is not started before" in text
    assert "claude works again" in text


@pytest.mark.slow
def test_a_limit_outlives_a_restart(project: Any, claude: Callable[..., list[str]]) -> None:
    """The pause is in the journal: the next run starts nothing before its end, then goes on."""
    configure(project, WAIT)
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    claude(limit(4_102_444_800))  # 2100: clamped to eight days

    for _ in range(2):
        process = project.start("run")
        project.read_until(process, "claude rests for ")
        process.terminate()
        project.finish(process, 143)
    path = project.root / ".git/orchestrator/run.json"
    state = json.loads(path.read_text())
    state["pauses"][0]["until"] = 1.0  # as if the time had passed
    path.write_text(json.dumps(state))
    done = project.run("run")

    assert claude() == ["WRK-001 plan 1"] * 2
    assert "claude works again" in done.stderr
    assert project.items() == {}
    assert journal(project).pauses == {}


@pytest.mark.slow
def test_halt_starts_anew_when_somebody_runs_it_again(project: Any, claude: Callable[..., list[str]]) -> None:
    configure(project)
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    claude(limit(4_102_444_800))

    halted = project.run("run", code=4)
    path = project.root / ".git/orchestrator/run.json"
    state = json.loads(path.read_text())  # as if the run before had been one that waits
    state["pauses"] = [AgentPause("claude", 4_102_444_800.0, 1, "limit")._asdict()]
    path.write_text(json.dumps(state))
    project.run("run")

    limited = "claude: usage limit reached (five_hour); resets at 2100-01-01T00:00:00+00:00"
    assert f"(CircuitBreakerTripped): {limited}\n" in halted.stderr
    assert claude() == ["WRK-001 plan 1"] * 2
    assert project.items() == {}


@pytest.mark.slow
def test_an_api_that_fails_for_now_charges_nobody(project: Any, claude: Callable[..., list[str]]) -> None:
    configure(project, "max_retries = 0")
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    claude(*[OVERLOADED] * 3)

    done = project.run("run")

    assert claude() == ["WRK-001 plan 1"] * 4
    assert done.stderr.count("no attempt is charged") == 3
    assert "1 phase (limit 100)" in done.stderr
    assert project.items() == {}


@pytest.mark.slow
def test_an_api_that_fails_for_good_ends_the_run_and_blocks_nothing(
    project: Any, claude: Callable[..., list[str]]
) -> None:
    configure(project, "max_retries = 0")
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    claude(*[OVERLOADED] * 50)

    done = project.run("run", code=4)

    assert claude() == ["WRK-001 plan 1"] * orchestrator.PROBES
    assert "(CircuitBreakerTripped): claude: the API failed: API Error: 529 (8 times in a row)\n" in done.stderr
    assert project.statuses() == {"WRK-001": "in_progress plan"}
    assert "attempts" not in project.text()


@pytest.mark.slow
def test_a_failure_before_the_interruption_still_counts_and_is_told(
    project: Any, claude: Callable[..., list[str]]
) -> None:
    """Attempt 1 fails, attempt 2 is refused: it is attempt 2 again, with the failure in its prompt."""
    configure(project, "max_retries = 1")
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    claude({"type": "result", "is_error": True, "result": "I gave up"}, OVERLOADED)

    project.run("run")

    assert claude() == ["WRK-001 plan 1", "WRK-001 plan 2", "WRK-001 plan 2"]
    prompts = [path.read_text() for path in (project.root / ".orchestrator/prompts").iterdir()]
    assert sum("> no result file was written (exit code 1); it reports: I gave up" in text for text in prompts) == 2


@pytest.mark.slow
def test_other_agents_work_on_while_one_rests(project: Any, claude: Callable[..., list[str]]) -> None:
    command = json.dumps([sys.executable, "-E", "-S", str(project.outside / "agent.py")])
    configure(project, WAIT, '{ name = "plan", agent = "command" }, { name = "check" }', f"command = {command}")
    project.backlog(
        "WRK-001 in_progress phase=check phase_pool=main", "WRK-002 in_progress phase=plan phase_pool=main"
    )
    project.commit_all()
    claude(limit(4_102_444_800))

    process = project.start("run")
    project.read_until(process, "WRK-002 is in_progress, check next")
    process.terminate()
    project.finish(process, 143)

    assert claude() == ["WRK-001 check 1"]
    assert project.statuses() == {"WRK-001": "in_progress check", "WRK-002": "in_progress check"}


OPENCODE = r"""#!/bin/sh
# Breaks when it is started beside one that has not made its database yet.
here=$(dirname "$0")
cat > /dev/null
if [ ! -e "$here/database" ]; then
    mkdir "$here/migration" || { touch "$here/second"; echo 'database is locked'; exit 1; }
    for _ in 1 2 3 4 5 6 7 8 9 10; do [ -e "$here/second" ] && break; sleep 0.05; done
    touch "$here/database"
fi
echo '{"type":"text","part":{"text":"Hello"}}'
printf '{"item_id":"%s","phase":"plan","result":"phase_complete","summary":"ok"}' "$ORCHESTRATOR_ITEM_ID" > "$ORCHESTRATOR_RESULT_PATH"
"""


@pytest.mark.slow
def test_the_first_opencode_of_a_run_starts_alone(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.outside / "opencode").write_text(OPENCODE)
    (project.outside / "opencode").chmod(0o755)
    monkeypatch.setenv("PATH", f"{project.outside}:{os.environ['PATH']}")
    configure(project, "max_concurrent = 2\nmax_wip = 2")
    text = (project.root / "orchestrator.toml").read_text()
    (project.root / "orchestrator.toml").write_text(text.replace('"claude"', '"opencode"'))
    project.backlog(*(f"WRK-00{n} in_progress phase=plan phase_pool=main" for n in (1, 2)))
    project.commit_all()

    log = project.run("run").stderr

    assert "failed" not in log
    assert project.items() == {}
    assert (project.outside / "database").exists()


# ---- What is shown meanwhile ---------------------------------------------------------------------


def test_the_live_line_tells_what_runs_what_rests_and_what_it_cost(
    project: Any, claude: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(project)
    session = run_by(Clock(), project, monkeypatch)  # of nothing, to have one
    scheduler, task = session.scheduler, Task("WRK-001", Phase("plan"), "main")
    now = time.monotonic()
    scheduler.running["WRK-001"] = orchestrator.Running(task, now - 65, now)
    scheduler.totals.add_usage(task, orchestrator.Usage(0.25, 1000, 200))
    scheduler.live.note("WRK-001", Progress("Bash: make test", orchestrator.Usage(0.5, 30, 4)))
    scheduler.ledger.clock = lambda: datetime.fromtimestamp(NOW, UTC)
    scheduler.ledger.journal.pauses = {"codex": AgentPause("codex", NOW + 5400, 1, "why")}

    assert scheduler._live_text() == (
        "phases 0/10 · WRK-001 plan 1 min 05 s, codex rests, 1 h 30 min left · done 0 · blocked 0 · 1,234 tokens · $0.75"
    )


@pytest.mark.slow
def test_the_log_tells_now_and_then_what_an_agent_does(
    project: Any, claude: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    configure(project)
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    monkeypatch.setattr(orchestrator, "PROGRESS_LOG_S", 0.0)
    orchestrator.log().propagate = True

    with caplog.at_level("INFO", "orchestrator"):
        run_by(Clock(), project, monkeypatch)

    assert re.search(r"\[WRK-001\]\[PLAN\] at work: \d+ s, 11 tokens \$0\.50, Done", caplog.text)


def test_a_journal_from_before_breakers_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    Journal(path, "run-1", None).write()
    rows = json.loads(path.read_text())
    path.write_text(json.dumps({key: rows[key] for key in rows if key not in ("pauses", "spent")}))

    read = Journal.read(path)

    assert read is not None
    assert (read.run_id, read.pauses, read.spent) == ("run-1", {}, {})


# ---- What it costs -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_budget_is_passed_on_and_ends_the_run(project: Any, claude: Callable[..., list[str]]) -> None:
    """Each attempt costs half a dollar: the second gets what the first left, the third is not made."""
    configure(project, "max_cost_usd = 0.75", '{ name = "plan" }, { name = "design" }, { name = "check" }')
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    fake = project.outside / "claude"
    fake.write_text(FAKE_CLAUDE.replace("cat > /dev/null", 'cat > /dev/null; echo "$*" >> "$here/argv"'))

    done = project.run("run", "--json")

    budgets = [line.rpartition("--max-budget-usd ")[2] for line in (project.outside / "argv").read_text().splitlines()]
    assert budgets == ["0.7500", "0.2500"]
    summary = json.loads(done.stdout)
    assert (summary["halt_reason"], summary["cost_usd"], summary["input_tokens"]) == ("CapReached", 1.0, 20)
    assert summary["spent"] == [
        {"item": "WRK-001", "phase": phase, "cost_usd": 0.5, "input_tokens": 10, "output_tokens": 1}
        for phase in ("plan", "design")
    ]


@pytest.mark.slow
def test_an_attempt_that_runs_out_of_budget_is_not_charged(project: Any, claude: Callable[..., list[str]]) -> None:
    configure(project, "max_cost_usd = 0.25\nmax_retries = 0")
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    claude({"type": "result", "subtype": "error_max_budget_usd", "is_error": True, "total_cost_usd": 0.26})

    done = project.run("run")

    assert "(CapReached)" in done.stderr
    assert "interrupted (max_cost_usd is used up)" in done.stderr
    assert project.statuses() == {"WRK-001": "in_progress plan"}
    assert "attempts" not in project.text()
    status = json.loads(project.run("status", "--json").stdout)
    assert [(item["id"], item["cost_usd"]) for item in status["items"]] == [("WRK-001", 0.26)]  # not in the worklog yet


@pytest.mark.slow
def test_what_a_phase_cost_is_in_the_worklog_and_in_status(project: Any, claude: Callable[..., list[str]]) -> None:
    """All attempts count, those of an earlier run too; a summary cannot forge a cost."""
    configure(project, "max_retries = 1", '{ name = "plan" }, { name = "design" }')
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()
    failed = {"type": "result", "is_error": True, "result": "no", "total_cost_usd": 0.25}
    claude(failed, {**failed, "api_error_status": 401})

    project.run("run", code=4)
    project.run("run", "--cap", "1")

    (month,) = (project.root / "_worklog").iterdir()
    cost = "- **Cost:** about $1.00, 10 tokens in and 1 out\n"
    assert month.read_text().endswith(f"- **Summary:** ok\n{cost}\n---\n\n")
    assert month.read_text().encode() == project.git("show", f"HEAD:_worklog/{month.name}").encode()
    status = json.loads(project.run("status", "--json").stdout)
    assert status["items"][0]["cost_usd"] == 1.0
    assert journal(project).spent == {}


def test_the_last_completed_phase_is_read_back_from_worklogs() -> None:
    def entry(item_id: str, outcome: str, summary: str) -> str:
        text = worklog_entry(datetime.fromtimestamp(NOW, UTC), item_id, "T", "plan", outcome, summary)
        return orchestrator.worklog_with_cost(text, orchestrator.Usage(1.0))

    told = "First\n\n- **Cost:** no\n---\n  indented"
    months = [
        entry("WRK-001", "Complete", "Old") + entry("WRK-001", "Subphase Complete", told),
        entry("WRK-002", "Complete", "Other") + entry("WRK-001", "Failed", "No") + entry("WRK-0011", "Complete", "Not it"),
    ]
    assert orchestrator.worklog_summary(months, "WRK-001") == told
    assert orchestrator.worklog_summary(months, "WRK-003") is None
    assert orchestrator.worklog_summary([], "WRK-001") is None


@pytest.mark.slow
def test_the_summary_of_the_previous_phase_outlives_a_restart(project: Any) -> None:
    project.script({"*/plan": [{"result": {"summary": "Chose the short way"}}], "*/build": [{"write": {"a": "1\n"}}]})
    project.backlog("WRK-001 in_progress phase=plan phase_pool=main")
    project.commit_all()

    project.run("run", "--cap", "1")
    project.run("run", "--cap", "1")

    prompt = (project.outside / "prompt-WRK-001-build-1.md").read_text()
    assert "## Previous Phase Summary\n\n> Chose the short way\n" in prompt


def test_costs_are_read_back_from_worklogs(tmp_path: Path) -> None:
    entry = worklog_entry(datetime.fromtimestamp(NOW, UTC), "WRK-001", "T", "plan", "Complete", "a\n- **Cost:** about $9.00\n---\n## x — WRK-002 (y)")
    parts = [orchestrator.Usage(0.125, 1234, 5), orchestrator.Usage(None, 7, 0), orchestrator.Usage(3.5), orchestrator.Usage()]
    text = "".join(orchestrator.worklog_with_cost(entry, usage) for usage in parts)

    assert orchestrator.worklog_costs([text, text]) == {"WRK-001": orchestrator.Usage(7.25, 2482, 10)}
    assert orchestrator.worklog_with_cost(entry, orchestrator.Usage()) == entry
