"""`check --probe`: every configured agent is run once, and what is missing is said with its remedy."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator import main

DATA = Path(__file__).parent / "data/agents"
WORKS = """cat > "$here/prompt"
echo '{"type":"result","is_error":false,"total_cost_usd":0.25,"usage":{"input_tokens":10,"output_tokens":2}}'
printf '{"item_id":"PROBE-1","phase":"probe","result":"phase_complete","summary":"ok"}' > "$ORCHESTRATOR_RESULT_PATH"
"""


@pytest.fixture(autouse=True)
def restored_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_PID", "")  # a probe sets it


def agents(project: Any, monkeypatch: pytest.MonkeyPatch, more: str = "", **scripts: str) -> None:
    """CLIs on the PATH, each a shell script; the first one is the default agent."""
    folder = project.outside / "bin"
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f'#!/bin/sh\nhere=$(dirname "$0")\necho "$*" >> "$here/{name}.argv"\n{script}')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IS_SANDBOX", "1")
    (project.root / "orchestrator.toml").write_text(f'[agent]\ncli = "{next(iter(scripts))}"\n{more}')
    project.commit_all()


def check(project: Any, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = main(["--root", str(project.root), "check", *args])
    return code, capsys.readouterr().out


def test_agents_that_work_are_run_once_for_each_model(project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    phases = '[pipelines.feature]\nphases = [{ name = "a" }, { name = "b", model = "big" }, { name = "c" }, { name = "d", run = ["make"] }]\n'
    agents(project, monkeypatch, phases, claude=WORKS)
    assert check(project, capsys) == (0, "ready to run\n")
    assert not (project.outside / "bin/claude.argv").exists()  # without the option no agent is run
    code, out = check(project, capsys, "--probe")
    _, first, second, last = out.splitlines()
    assert code == 0
    assert first.split()[:3] == ["claude", "-", "works"]
    assert first.endswith("$0.2500")
    assert second.split()[:3] == ["claude", "big", "works"]
    assert last == "ready to run"
    flags = "-p --output-format stream-json --verbose --dangerously-skip-permissions"
    assert (project.outside / "bin/claude.argv").read_text() == f"{flags}\n{flags} --model big\n"
    assert project.status() == ""


LOOK = "Look at its output in .orchestrator/logs/PROBE-1/, and at [agent]: model, args, env."
REMEDIES = [
    ("claude", "claude-nologin", 1, "claude: Not logged in · Please run /login",
     f"Log in: start `claude` once and use /login, or set ANTHROPIC_API_KEY. {LOOK}"),
    ("codex", "codex-401", 1, "codex: unexpected status 401 Unauthorized", f"Log in: `codex login`. {LOOK}"),
    ("opencode", "opencode-401", 1, "opencode: APIError: bad key", f"Log in: `opencode auth login`. {LOOK}"),
    ("gemini", "gemini-401", 145, "gemini: [API Error:",
     f"Log in: start `gemini` once and log in, or set GEMINI_API_KEY. {LOOK}"),
    ("claude", "claude-limit", 1, "claude: usage limit reached (five_hour); resets at 2027-01-15",
     'Wait for the reset; on_usage_limit = "wait" lets a run do that.'),
    ("gemini", "gemini-offline", 1, "gemini: [API Error: exception TypeError: fetch failed",
     f"Try again later, as a run would by itself. {LOOK}"),
    ("opencode", "opencode-ok", 0, "opencode: no result file was written (exit code 0)", LOOK),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("cli", "stream", "exit_code", "what", "remedy"), REMEDIES, ids=[row[1] for row in REMEDIES])
def test_what_is_wrong_is_said_with_its_remedy(
    project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    cli: str, stream: str, exit_code: int, what: str, remedy: str,
) -> None:  # fmt: skip
    agents(project, monkeypatch, **{cli: f"cat '{DATA}/{stream}.jsonl'\nexit {exit_code}\n"})
    code, out = check(project, capsys, "--probe", "--json")
    found = json.loads(out)
    assert code == 1
    (problem,) = found["problems"]
    assert problem["what"].startswith(what)
    assert problem["remedy"] == remedy
    assert [(probe["agent"], probe["model"], probe["works"]) for probe in found["probes"]] == [(cli, None, False)]


def test_an_agent_that_is_missing_or_refuses_root_is_not_run(project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    phases = '[pipelines.feature]\nphases = [{ name = "a", agent = "codex" }]\n'
    agents(project, monkeypatch, phases, claude=WORKS)
    monkeypatch.setenv("PATH", f"{project.outside / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("IS_SANDBOX", "yes")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    code, out = check(project, capsys, "--probe")
    assert code == 1
    assert "problem: claude refuses to work unattended as root\n  Run as an ordinary user" in out
    assert "problem: the agent 'codex' is not on PATH or not executable\n  Install it (npm install -g @openai/codex)" in out
    assert not (project.outside / "bin/claude.argv").exists()
