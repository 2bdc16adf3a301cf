"""The real `claude` CLI, end to end, against a scripted model on 127.0.0.1: no account, no network.

`.ci/run` installs the pinned version into `.agents/claude`; by hand:
npm install --prefix .agents/claude @anthropic-ai/claude-code@2.1.112 (64 MB, plain JavaScript).
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.llm_server import Answer, Call, LlmServer, Refusal, Say

CLAUDE = Path(__file__).resolve().parent.parent / ".agents/claude/node_modules/.bin/claude"

pytestmark = [
    pytest.mark.agents,
    pytest.mark.skipif(not CLAUDE.exists(), reason="claude is not installed in .agents/claude"),
]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LlmServer]:
    """The scripted model; claude finds it by its environment, and nothing of the operator's."""
    server = LlmServer()
    for folder in ("home", "tmp"):
        (tmp_path / folder).mkdir(mode=0o700)
    settings = {
        "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "IS_SANDBOX": "1",
        "PATH": f"{CLAUDE.parent}{os.pathsep}{os.environ['PATH']}", "NO_PROXY": "127.0.0.1",
        "ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_API_KEY": "scripted", "CLAUDE_CODE_MAX_RETRIES": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


class Asked:
    """What a prompt of ours says."""

    def __init__(self, text: str) -> None:
        def find(pattern: str) -> str:
            found = re.search(pattern, text, re.MULTILINE)
            return found[1] if found else ""

        self.item = find(r"^- \*\*ID:\*\* (\S+)$") or "PROBE-1"  # whose prompt names nothing
        self.phase = find(r"^- \*\*Phase:\*\* (\w+)") or "probe"
        self.attempt = find(r"^- \*\*Attempt:\*\* (\d+) of")
        self.result = find(r"^```text\n(.+)\n```$")
        self.failure = find(r"^> (no result file .+)$")

    def __str__(self) -> str:
        return f"{self.item} {self.phase} {self.attempt}"


def report(asked: Asked) -> Call:
    result = {"item_id": asked.item, "phase": asked.phase, "result": "phase_complete", "summary": "Did it"}
    return Call(f"printf %s {shlex.quote(json.dumps(result))} > {shlex.quote(asked.result)}")


def play(*answers: Answer) -> Callable[[str, int], Answer]:
    """Do the given steps, then report completion."""

    def script(text: str, done: int) -> Answer:
        if done < len(answers):
            return answers[done]
        return report(Asked(text)) if done == len(answers) else Say("Finished.")

    return script


def configure(project: Any, phases: str = '{ name = "plan" }', execution: str = "", items: int = 1) -> None:
    (project.root / "orchestrator.toml").write_text(
        f"[execution]\nretry_delay_seconds = 0\n{execution}\n[pipelines.feature]\nphases = [{phases}]\n"
    )
    project.set_up(*(f"WRK-00{n + 1} in_progress phase=plan phase_pool=main" for n in range(items)))


BUILD = '{ name = "plan" }, { name = "build", is_destructive = true }'


def conversations(model: LlmServer) -> list[str]:
    """ITEM PHASE ATTEMPT of every conversation, as they began."""
    return [str(Asked(text)) for text, done in model.asked if done == 0]


LEFT = "setsid nohup sleep 601 > /dev/null 2>&1 & echo $! > ../outside/left; setsid env -i sleep 602 > /dev/null 2>&1 &"


def test_two_agents_at_once_a_failure_and_its_retry(project: Any, model: LlmServer) -> None:
    """Two plans side by side, then two builds; the first build gives up at its first attempt.

    Nothing survives that their tool commands have left.
    """

    def script(text: str, done: int) -> Answer:
        asked = Asked(text)
        if str(asked) == "WRK-001 build 1":
            return Call("echo half > WRK-001.txt") if done == 0 else Say("I give up.")
        folder = f"changes/{asked.item}_item-{asked.item.lower()}"
        work = {"plan": f"echo plan > {folder}/plan.md", "build": f"echo work > {asked.item}.txt; {LEFT}"}
        return play(Call(work[asked.phase]))(text, done)

    model.script = script
    configure(project, BUILD, "max_wip = 2\nmax_concurrent = 2", items=2)

    summary = json.loads(project.run("run", "--json").stdout)

    assert sorted(conversations(model)) == [
        "WRK-001 build 1", "WRK-001 build 2", "WRK-001 plan 1", "WRK-002 build 1", "WRK-002 plan 1",
    ]  # fmt: skip
    told = [Asked(text).failure for text, _ in model.asked if str(Asked(text)) == "WRK-001 build 2"]
    assert set(told) == {"no result file was written (exit code 0)"}
    assert project.items() == {}
    assert [(project.root / f"WRK-00{n}.txt").read_text() for n in (1, 2)] == ["work\n"] * 2
    spent = {(row["item"], row["phase"]): row["input_tokens"] for row in summary["spent"]}
    assert spent == {
        ("WRK-001", "plan"): 3000, ("WRK-002", "plan"): 3000, ("WRK-001", "build"): 5000, ("WRK-002", "build"): 3000,
    }  # fmt: skip
    assert summary["cost_usd"] == pytest.approx(14 * 0.006)
    assert project.status() == ""
    assert not Path(f"/proc/{(project.outside / 'left').read_text().strip()}").exists()
    assert project.survivors() == []


def test_too_many_requests_charge_nobody(project: Any, model: LlmServer) -> None:
    """The CLI gives up once after a retry of its own; the second time its retry gets through."""
    model.script = play()
    configure(project)
    probe = project.run("check", "--probe").stdout
    assert re.fullmatch(r"AGENT +WORKS +SECONDS +COST\nclaude +works +\d+ s +about \$0\.0120\nready to run\n", probe)
    model.asked.clear()
    refusals = [Refusal(429, "rate_limit_error", "slow down")] * 3
    model.script = lambda text, done: refusals.pop() if refusals else play()(text, done)
    configure(project, execution="max_retries = 0")
    log = project.run("run").stderr
    assert conversations(model) == ["WRK-001 plan 1"] * 4
    assert log.count("claude: API Error: Request rejected (429)") == 1
    assert "no attempt is charged" in log
    assert project.items() == {}


def test_a_usage_limit_is_waited_for(project: Any, model: LlmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")  # only subscriptions have such limits
    monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-scripted")
    told = {"status": "rejected", "reset": "4102444800", "representative-claim": "five_hour"}
    limit = {f"anthropic-ratelimit-unified-{name}": value for name, value in told.items()}
    model.script = lambda text, done: Refusal(429, "rate_limit_error", "limit", limit)
    configure(project, execution='on_usage_limit = "wait"')
    process = project.start("run")
    log = project.read_until(process, "claude rests for")
    process.terminate()
    project.finish(process, 143)
    assert "claude: usage limit reached (five_hour); resets at 2100-01-01 00:00 UTC" in log
    assert conversations(model) == ["WRK-001 plan 1"]
    assert project.statuses() == {"WRK-001": "in_progress plan"}


def test_a_kill_in_the_middle_of_a_tool_command(project: Any, model: LlmServer) -> None:
    """The next run ends what is left, and nothing is charged."""
    announce = Call(f"echo busy; echo ready > {project.outside}/announce; sleep 100")
    model.script = lambda text, done: announce if done == 0 else Say("?")
    configure(project)
    process = project.start("run")
    assert project.announced() == "ready"
    process.kill()
    project.finish(process, -9)
    after_kill = project.survivors()
    model.script = play()
    last = project.run("run")
    assert after_kill != []
    assert "ended a process that an agent left behind" in last.stderr
    assert project.survivors() == []
    assert set(conversations(model)) == {"WRK-001 plan 1"}
    assert project.items() == {}


def test_the_budget_ends_the_run_and_charges_nobody(project: Any, model: LlmServer) -> None:
    model.script = play(Call("echo 1"), Call("echo 2"), Call("echo 3"))
    configure(project, execution="max_cost_usd = 0.01\nmax_retries = 0")
    log = project.run("run").stderr
    assert "interrupted (max_cost_usd is used up)" in log
    assert "(CapReached)" in log
    assert len(model.asked) == 2  # 0.6 cents each: the CLI itself stopped after the second
    assert project.statuses() == {"WRK-001": "in_progress plan"}
