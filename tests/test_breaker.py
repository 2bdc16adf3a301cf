"""Usage limits and failing APIs: who rests, until when, across restarts, and who works meanwhile."""

import asyncio
import json
import os
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator import AgentPause, pause_after

NOW = 1_000_000.0
DAY = 86400.0

@pytest.mark.parametrize(
    ("reset", "strikes", "ends"),
    [
        (NOW + 3600, 1, 3600), (NOW + 3600, 5, 3600), (NOW + 7 * DAY, 1, 7 * DAY),
        (NOW - 5, 1, 60), (0.0, 1, 60),  # a limit that outlives its announced reset must not spin
        (NOW * 1000, 1, 8 * DAY),  # milliseconds by mistake
        (None, 1, 900), (None, 2, 1800), (None, 3, 3600), (None, 4, 7200), (None, 400, 7200),
    ],
)  # fmt: skip
def test_a_limit_ends_at_its_reset_within_bounds(reset: float | None, strikes: int, ends: float) -> None:
    before = AgentPause("claude", 0.0, strikes - 1, "", "limit" if reset is None else "reset")
    assert pause_after(refused(until=reset), "claude", before, orchestrator.default_config(Path()), NOW).until - NOW == ends


def refused(kind: Any = "limited", until: float | None = None, seconds: float = 2.0) -> orchestrator.AgentOutcome:
    return orchestrator.AgentOutcome(kind, error=f"claude: {kind}", until=until, seconds=seconds)


def test_failed_probes_rest_longer_but_attempts_under_way_do_not_count() -> None:
    config = orchestrator.Config(pipelines={}, execution=orchestrator.Execution(retry_delay_seconds=5))
    first = pause_after(refused(), "claude", None, config, NOW)
    neighbour = pause_after(refused(seconds=300), "claude", first, config, NOW + 60)
    probe = pause_after(refused(), "claude", neighbour, config, neighbour.until + 2)
    assert first == AgentPause("claude", NOW + 900, 1, "claude: limited", "limit")
    assert neighbour == first._replace(until=NOW + 960)
    assert probe == first._replace(until=neighbour.until + 2 + 1800, strikes=2)
    # A shorter rest does not end a longer one, and another kind counts anew.
    night = pause_after(refused(until=NOW + 7200), "claude", None, config, NOW)
    assert night.kind == "reset"
    assert pause_after(refused("failed", seconds=30), "claude", night, config, NOW + 9) == night
    after = pause_after(refused("failed"), "claude", night._replace(strikes=3), config, NOW + 7300)
    assert after == AgentPause("claude", NOW + 7305, 1, "claude: failed", "busy")


FAKE_CLAUDE = r"""#!/bin/sh
# Refuses as often as there are files in `refusals`, each of an event or more; then does the work.
# A file is taken by renaming it, so of two agents at once each gets its own.
here=$(dirname "$0")
cat > /dev/null
echo "$*" >> "$here/argv"
printf '%s %s %s\n' "$ORCHESTRATOR_ITEM_ID" "$ORCHESTRATOR_PHASE" "$ORCHESTRATOR_ATTEMPT" >> "$here/claude.log"
for event in "$here"/refusals/*; do
    if mv "$event" "$here/taken.$$" 2> /dev/null; then
        [ "$ORCHESTRATOR_PHASE" = build ] && echo half > code.txt
        cat "$here/taken.$$"
        exit 1
    fi
done
[ "$ORCHESTRATOR_PHASE" = build ] && echo whole > code.txt
echo '{"type":"result","is_error":false,"result":"Done","total_cost_usd":0.5,"usage":{"input_tokens":10,"output_tokens":1}}'
printf '{"item_id":"%s","phase":"%s","result":"phase_complete","summary":"ok"}' "$ORCHESTRATOR_ITEM_ID" "$ORCHESTRATOR_PHASE" > "$ORCHESTRATOR_RESULT_PATH"
"""


def limit(reset: float | None = None) -> dict[str, object]:
    return {"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": reset, "rateLimitType": "five_hour"}}


def end(text: str = "", **more: object) -> dict[str, object]:
    return {"type": "result", "subtype": "success", "is_error": True, "result": text, **more}


WORKED = {"type": "assistant", "message": {"content": [{"type": "tool_use", "name": "Bash", "input": {"command": "make"}}]}}
OVERLOADED = end("API Error: 529", api_error_status=529)
SESSION = end("You've hit your session limit · resets 4:10am (America/Sao_Paulo)", api_error_status=429)
IN_2100 = 4_102_444_800  # clamped to eight days
WAIT = 'on_usage_limit = "wait"\n'
TWICE = "max_concurrent = 2\nmax_wip = 2\n"


class Claude:
    """A project whose agent is a `claude` that refuses first, and then does its work."""

    def __init__(self, project: Any) -> None:
        self.project = project
        self.configure()
        self.script(FAKE_CLAUDE)
        (project.outside / "refusals").mkdir()

    def script(self, text: str, name: str = "claude") -> None:
        (self.project.outside / name).write_text(text)
        (self.project.outside / name).chmod(0o755)

    def refuse(self, *events: object) -> None:
        for number, event in enumerate(events):
            rows = event if isinstance(event, list) else [event]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (self.project.outside / "refusals" / f"{number:02}").write_text(text)

    @property
    def asked(self) -> list[str]:
        """`ITEM PHASE ATTEMPT` of every start."""
        log = self.project.outside / "claude.log"
        return log.read_text().splitlines() if log.exists() else []

    def configure(self, execution: str = "", phases: str = '{ name = "plan" }', agent: str = 'cli = "claude"') -> None:
        (self.project.root / "orchestrator.toml").write_text(
            f"[agent]\n{agent}\n[execution]\nretry_delay_seconds = 0\n{execution}\n"
            f"[pipelines.feature]\nphases = [{phases}]\n"
        )
        self.project.commit_all()

    def items(self, count: int = 1, phase: str = "plan") -> None:
        self.project.backlog(*(f"WRK-0{n + 1:02} in_progress phase={phase} phase_pool=main" for n in range(count)))
        self.project.commit_all()

    def rests(self) -> None:
        """A run that is waiting, and is ended then."""
        process = self.project.start("run")
        self.project.read_until(process, "claude rests for ")
        process.terminate()
        self.project.finish(process, 143)

    def charged_nobody(self, *phases: str) -> bool:
        return "attempts" not in self.project.text() and set(self.project.statuses().values()) == {*phases}


@pytest.fixture
def claude(project: Any, monkeypatch: pytest.MonkeyPatch) -> Claude:
    monkeypatch.setenv("PATH", f"{project.outside}:{os.environ['PATH']}")
    monkeypatch.setenv("IS_SANDBOX", "1")
    one = Claude(project)
    one.items()
    return one


class Clock:
    """A clock for the ledger: a minute passes whenever somebody looks."""

    def __init__(self) -> None:
        self.seconds = NOW

    def __call__(self) -> datetime:
        self.seconds += 60
        return datetime.fromtimestamp(self.seconds, UTC)


def run_by(clock: Clock, project: Any, monkeypatch: pytest.MonkeyPatch) -> orchestrator.Run:
    """A run in this process, by another clock; caplog hears each of its lines once."""
    monkeypatch.setattr(orchestrator, "POLL_S", 0.01)
    monkeypatch.setattr(orchestrator.log(), "handlers", [])
    monkeypatch.setattr(orchestrator.log(), "propagate", True)
    space = orchestrator.open_workspace(project.root, None)
    orchestrator.import_asyncio()
    live = orchestrator.LiveLine(enabled=False)
    run = orchestrator.Run(space, orchestrator.RunOptions(cap=10), live, "test")
    run.ledger.clock = clock
    with space.run_lock("test"):
        asyncio.run(run.conduct())
    return run


def rest(project: Any, until: float) -> None:
    """Journal a rest of claude, as if the last run had been one that waits."""
    space = orchestrator.open_workspace(project.root, None)
    pause = AgentPause("claude", until, 1, "limit", "limit")
    space.store.note({"rests": {"claude": pause._asdict()}})


@pytest.mark.slow
def test_wait_lets_one_probe_through_at_the_reset(project: Any, claude: Claude, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Two items may run at once; the limit is hit twice, then it is over."""
    claude.configure(WAIT + TWICE + "max_retries = 0")
    claude.items(2)
    reset = NOW + 5 * 3600
    claude.refuse(limit(reset), limit(reset), limit())  # both refused, then the probe is
    clock = Clock()

    with caplog.at_level("INFO", "orchestrator"):
        run = run_by(clock, project, monkeypatch)

    assert sorted(claude.asked[:2]) == ["WRK-001 plan 1", "WRK-002 plan 1"]
    assert claude.asked[2] == claude.asked[3] == "WRK-001 plan 1"  # one alone, and no attempt was charged
    assert sorted(claude.asked[3:]) == ["WRK-001 plan 1", "WRK-002 plan 1"]
    assert run.reason == orchestrator.HaltReason.ALL_DONE_OR_BLOCKED
    assert (sorted(run.completed), run.phases) == (["WRK-001", "WRK-002"], 2)
    assert clock.seconds > reset + 900  # the probe's refusal named no reset
    told = [record.getMessage() for record in caplog.records if "usage limit" in record.getMessage()]
    limited = "[WRK-001][PLAN] claude: usage limit reached (five_hour)"
    first = told[0].replace("WRK-002", "WRK-001")  # whichever of the two met it first
    assert first.startswith(f"{limited}; resets at 1970-01-12 18:46 UTC; claude rests for 4 h ")
    assert told[0].endswith(", until 1970-01-12 18:46 UTC, no attempt is charged")
    assert told[1].startswith(f"{limited}; claude rests for ")
    assert len(told) == 2  # one for both agents that met it at once, one for the probe
    assert caplog.text.count("claude works again") == 1
    assert not (project.root / ".git/orchestrator/journal").exists()


@pytest.mark.slow
def test_a_limit_outlives_a_restart_but_one_that_halted_does_not(project: Any, claude: Claude) -> None:
    """Only who waits has the pause in the journal: the next run starts nothing before its end, then goes on."""
    claude.refuse(limit(IN_2100), limit(IN_2100))
    halted = project.run("run", code=4)
    claude.configure(WAIT)
    claude.rests()
    claude.rests()
    asked = claude.asked
    rest(project, 1.0)  # as if the time had passed
    done = project.run("run")
    limited = "claude: usage limit reached (five_hour); resets at 2100-01-01 00:00 UTC"
    assert f"(CircuitBreakerTripped): {limited}\n" in halted.stderr
    assert asked == ["WRK-001 plan 1"] * 2
    assert claude.asked == ["WRK-001 plan 1"] * 3
    assert "claude works again" in done.stderr
    assert project.items() == {}


@pytest.mark.slow
def test_three_limits_after_a_stated_reset_end_the_wait(project: Any, claude: Claude, monkeypatch: pytest.MonkeyPatch) -> None:
    claude.configure(WAIT)
    claude.refuse(*[limit(NOW)] * 9)
    run = run_by(Clock(), project, monkeypatch)
    assert run.reason == orchestrator.HaltReason.CIRCUIT_BREAKER_TRIPPED
    assert claude.asked == ["WRK-001 plan 1"] * 4
    assert claude.charged_nobody("in_progress plan")


@pytest.mark.slow
def test_other_agents_work_on_while_one_rests(project: Any, claude: Claude) -> None:
    command = json.dumps([sys.executable, "-E", "-S", str(project.outside / "agent.py")])
    phases = '{ name = "plan", agent = "command" }, { name = "check" }'
    claude.configure(WAIT, phases, f'cli = "claude"\ncommand = {command}')
    project.backlog(
        "WRK-001 in_progress phase=check phase_pool=main", "WRK-002 in_progress phase=plan phase_pool=main"
    )
    project.commit_all()
    claude.refuse(limit(IN_2100))
    process = project.start("run")
    project.read_until(process, "WRK-002 is in_progress, check next now")
    process.terminate()
    project.finish(process, 143)
    assert claude.asked == ["WRK-001 check 1"]
    assert claude.charged_nobody("in_progress check")


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
def test_an_opencode_that_breaks_beside_another_is_started_again(project: Any, claude: Claude) -> None:
    claude.script(OPENCODE, "opencode")
    claude.configure(TWICE, agent='cli = "opencode"')
    claude.items(2)
    log = project.run("run").stderr
    assert "failed" not in log
    assert project.items() == {}
    assert (project.outside / "second").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "says"),
    [
        (SESSION, r"claude: You've hit your session limit .*; resets at \d{4}-\d\d-\d\d 07:10 UTC\n"),
        (end("Session limit reached ∙ resets 10am"), r"claude: Session limit reached .*; resets at \d{4}-\d\d-\d\d 10:00 UTC\n"),
        (end("Your organization has been disabled"), r"claude: Your organization has been disabled\n"),
        (None, r"claude: API Error: 529 \(8 times in a row\)\n"),
    ],
    ids=["session", "untimed", "organization", "overloaded"],
)
def test_the_run_halts_in_the_words_of_the_cli(project: Any, claude: Claude, event: Any, says: str) -> None:
    claude.configure("max_retries = 0")
    claude.items(2)
    claude.refuse(*([event] if event else [OVERLOADED] * 50))
    log = project.run("run", code=4).stderr
    assert re.search(r"\(CircuitBreakerTripped\): " + says, log)
    assert claude.asked[0] == "WRK-001 plan 1"
    assert len(claude.asked) == (1 if event else orchestrator.FREE_ENDS_IN_A_ROW)
    assert claude.charged_nobody("in_progress plan")


@pytest.mark.slow
@pytest.mark.parametrize("event", [OVERLOADED, end("", num_turns=0), end("Selected model is at capacity.")])
def test_an_end_that_says_nothing_of_the_item_charges_nobody(project: Any, claude: Claude, event: Any) -> None:
    """Also if it meets a phase after another: one item's own work says nothing about another item's."""
    claude.configure("max_retries = 0", '{ name = "plan" }, { name = "design" }')
    claude.refuse(event, event)
    once = '[ "$ORCHESTRATOR_PHASE" = design ] && mkdir "$here/once" 2> /dev/null && echo overloaded >&2 && exit 1\nfor event in'
    claude.script(FAKE_CLAUDE.replace("for event in", once))
    log = project.run("run").stderr
    assert claude.asked == ["WRK-001 plan 1"] * 3 + ["WRK-001 design 1"] * 2
    assert log.count("no attempt is charged") == 3
    assert "2 phases (limit 100)" in log
    words = event["result"] or "gave no reason (exit code 1); its output is in .orchestrator/logs/WRK-001/plan-1.out"
    assert f"{words}; claude rests for " in log
    assert "failed" not in log
    assert project.items() == {}


@pytest.mark.slow
def test_a_failure_before_the_interruption_still_counts_and_is_told_with_what_all_have_cost(project: Any, claude: Claude) -> None:
    """Attempt 1 fails, attempt 2 is refused: it is attempt 2 again, with the failure in its prompt."""
    claude.configure("max_retries = 1", '{ name = "plan" }, { name = "design" }')
    claude.refuse([WORKED, end("I gave up", total_cost_usd=0.25)], end("no", total_cost_usd=0.25, api_error_status=529))
    project.run("run", "--cap", "1")
    assert claude.asked == ["WRK-001 plan 1", "WRK-001 plan 2", "WRK-001 plan 2"]
    prompts = [path.read_text() for path in (project.root / ".orchestrator/prompts").iterdir()]
    assert sum("> no result file was written (exit code 1); it reports: I gave up" in text for text in prompts) == 2
    (month,) = (project.root / "_worklog").iterdir()
    cost = "- **Cost:** about $1.00, 10 tokens in and 1 out\n"
    assert month.read_text().endswith(f"- **Summary:** ok\n{cost}\n---\n\n")
    assert month.read_text() == project.git("show", f"HEAD:_worklog/{month.name}")
    status = json.loads(project.run("status", "--json").stdout)
    assert status["items"][0]["cost_usd"] == 1.0


@pytest.mark.slow
def test_a_stop_between_two_attempts_counts_the_cost_of_the_first_once(project: Any, claude: Claude) -> None:
    merge = f"git -C {project.root} rev-parse HEAD > {project.root}/.git/MERGE_HEAD"  # so that the journal stays
    stop = f"{sys.executable} {project.program} --root {project.root} stop"
    claude.script(FAKE_CLAUDE.replace("exit 1", f"{merge}; {stop}; exit 1"))
    claude.refuse([WORKED, end("I gave up", total_cost_usd=0.25)])
    project.run("run")
    (item,) = json.loads(project.run("status", "--json").stdout)["items"]
    assert (claude.asked, item["attempts"], item["cost_usd"]) == (["WRK-001 plan 1"], 1, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["Prompt is too long", "A wording that nobody has seen"])
def test_one_bad_prompt_ends_up_blocked_and_the_others_are_done(project: Any, claude: Claude, words: str) -> None:
    """With one place, too: another item goes first and shows that the agent can work."""
    bad = 'if [ "$ORCHESTRATOR_ITEM_ID" = WRK-001 ]; then cat "$here/bad"; exit 1; fi\nfor event in'
    claude.script(FAKE_CLAUDE.replace("for event in", bad))
    (project.outside / "bad").write_text(json.dumps(end(words)) + "\n")
    claude.configure("max_retries = 1")
    ready = (f"WRK-0{n:02} ready" for n in range(2, 12))
    project.set_up("WRK-001 in_progress phase=plan phase_pool=main", *ready)
    log = project.run("run").stderr
    assert ("claude rests" in log) == (words != "Prompt is too long")  # that one is known for the item's
    assert project.statuses() == {"WRK-001": "blocked plan"}
    assert words in project.items()["WRK-001"]["blocked_reason"]


def test_a_check_that_cannot_run_halts_the_run_and_charges_nobody(project: Any) -> None:
    """What the agent did is not paid for again: the next start, with a check that works, commits it."""
    check = 'verify = [["sh", "-c", "echo no linter here; exit {}"]]\n'
    project.configure("build!", more=check.format(127), execution="max_retries = 0")
    project.set_up(*(f"WRK-00{n} in_progress phase=build phase_pool=main" for n in (1, 2)))
    project.script({"*": [{"write": {"a.txt": "1\n"}}], "WRK-002/*": [{"write": {"b.txt": "1\n"}}]})

    log = project.run("run", code=4).stderr
    says = "verify command `sh -c 'echo no linter here; exit 127'` failed with exit code 127 Last output: no linter here"
    assert f"(CircuitBreakerTripped): [WRK-001][build] is finished, but {says} Nothing is charged" in log
    assert project.agent_log() == ["WRK-001 build 1"]
    assert set(project.statuses().values()) == {"in_progress build"}
    assert "attempts" not in project.text()
    assert (project.root / "a.txt").read_text() == "1\n"
    assert "ready to run" not in (told := project.run("check").stdout)
    assert "to be committed: WRK-001 build" in told
    assert says[:30] in project.run("run", code=1).stderr  # it still cannot
    project.configure("build!", more=check.format(0), execution="max_retries = 0")
    project.run("run")
    assert project.agent_log() == ["WRK-001 build 1", "WRK-002 build 1"]
    assert [path for path in project.paths("HEAD~1") if path.endswith(".txt")] == ["a.txt"]
    assert project.git("log", "-1", "--format=%(trailers:key=Orchestrator-Verified,valueonly)", "HEAD~1").strip()
    assert project.status() == " M orchestrator.toml\n"


def test_the_live_line_tells_what_runs_what_rests_and_what_it_cost(project: Any, claude: Claude, monkeypatch: pytest.MonkeyPatch) -> None:
    project.set_up()
    run = run_by(Clock(), project, monkeypatch)  # of nothing, to have one
    task = orchestrator.Task("WRK-001", orchestrator.Phase("plan"), "main")
    so_far = orchestrator.Usage(0.5, 30, 4)
    run.attempts["WRK-001"] = orchestrator.Attempt(task, 1, "t", {}, last="Bash: make test", so_far=so_far, since=time.monotonic() - 65)
    run.spent["WRK-001", "plan"] = orchestrator.Usage(0.25, 1000, 200)
    run.ledger.clock = lambda: datetime.fromtimestamp(NOW, UTC)
    run.ledger.store.begin({"id": "again", "branch": "main", "head": None}, None)
    rest(project, NOW + 5400)
    run.ledger.take_in()
    assert run._live_text() == (
        "phases 0/10 · done 0 · blocked 0 · 1,234 tokens · $0.75 · WRK-001 plan 1 min 05 s, claude rests, 1 h 30 min left"
        "  Bash: make test"
    )


@pytest.mark.slow
def test_the_log_tells_now_and_then_what_an_agent_does(
    project: Any, claude: Claude, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(orchestrator, "PROGRESS_LOG_S", 0.0)
    monkeypatch.setattr(orchestrator, "SILENT_S", 0.4)
    claude.script(FAKE_CLAUDE.replace("for event in", "sleep 1\nfor event in") + "sleep 1\n")
    with caplog.at_level("INFO", "orchestrator"):
        run_by(Clock(), project, monkeypatch)
    assert re.search(r"\[WRK-001\]\[PLAN\] at work: \d+ s, about \$0\.5000, 10 tokens in and 1 out, Done", caplog.text)
    assert re.search(r"\[WRK-001\]\[PLAN\] at work: \d+ s, says nothing since \d\d:\d\d \(0 min\)\n", caplog.text)


@pytest.mark.slow
def test_a_budget_is_passed_on_and_ends_the_run(project: Any, claude: Claude) -> None:
    """Each attempt costs half a dollar: the second gets what the first left, the third is not made."""
    claude.configure("max_cost_usd = 0.75", '{ name = "plan" }, { name = "design" }, { name = "check" }')
    summary = json.loads(project.run("run", "--json").stdout)
    argv = (project.outside / "argv").read_text().splitlines()
    assert [line.rpartition("--max-budget-usd ")[2] for line in argv] == ["0.7500", "0.2500"]
    assert (summary["halt_reason"], summary["cost_usd"], summary["input_tokens"]) == ("CapReached", 1.0, 20)
    assert summary["spent"] == [
        {"item": "WRK-001", "phase": phase, "cost_usd": 0.5, "input_tokens": 10, "output_tokens": 1}
        for phase in ("plan", "design")
    ]


@pytest.mark.slow
def test_an_attempt_that_runs_out_of_budget_is_not_charged(project: Any, claude: Claude) -> None:
    claude.configure("max_cost_usd = 0.25\nmax_retries = 0")
    claude.refuse(end(subtype="error_max_budget_usd", total_cost_usd=0.26))
    log = project.run("run").stderr
    assert "(CapReached)" in log
    assert "interrupted (max_cost_usd is used up)" in log
    assert claude.charged_nobody("in_progress plan")
