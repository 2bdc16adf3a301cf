"""Agent processes: real children, real signals; agent CLIs appear as recorded event streams."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import orchestrator
from orchestrator import (
    AgentOutcome,
    AgentSettings,
    Attempt,
    Config,
    Execution,
    Phase,
    Site,
    Task,
    Usage,
    agent_argv,
    agent_environment,
    item_folder,
    run_attempt,
)

DATA = Path(__file__).parent / "data" / "agents"
FOREVER = 120.0  # seconds; longer than any test may take
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and subreaping")


# ---- Making attempts -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def subreaper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs as the orchestrator does, only with shorter looks."""
    for name, seconds in {"LOOK_S": 0.01, "LOOK_AROUND_S": 0.1, "SETTLE_S": 0.05}.items():
        monkeypatch.setattr(orchestrator, name, seconds)
    monkeypatch.setenv("ORCHESTRATOR_PID", "")  # so that it is restored after the test
    orchestrator.become_subreaper()
    yield
    assert orchestrator.LIVE == {}
    leave_subreaping()


def leave_subreaping() -> None:
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
    os.environ.pop("ORCHESTRATOR_PID", None)


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system without /proc and without subreaping: `ps` and polling."""
    leave_subreaping()
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.setattr(orchestrator, "ON_LINUX", False)


class Spec(NamedTuple):
    """An attempt and where it is made, in one."""

    root: Path
    settings: AgentSettings
    token: str
    stop: asyncio.Event
    hurry: asyncio.Event
    task: Task = Task("WRK-001", Phase("build"), "main")
    attempt: int = 1
    prompt: str = "Do it.\n"
    timeout_s: float = FOREVER
    idle_timeout_s: float = 0.0
    grace_s: float = FOREVER

    @property
    def both(self) -> tuple[Site, Attempt]:
        limits = Execution(phase_timeout_minutes=self.timeout_s / 60, idle_timeout_minutes=self.idle_timeout_s / 60, kill_grace_seconds=self.grace_s)
        site = Site("run-1", self.root, Config(pipelines={}, execution=limits, agent=self.settings), self.stop, self.hurry)
        return site, Attempt(self.task, self.attempt, self.token, {"id": "WRK-001", "title": "x"})

    @property
    def change_dir(self) -> Path:
        return item_folder(self.root, self.both[1].item)

    @property
    def result_path(self) -> Path:
        return self.both[0].result_path(self.both[1])

    @property
    def prompt_path(self) -> Path:
        return self.both[0].prompt_path(self.both[1])


SpecMaker = Callable[..., Spec]
Player = Callable[..., AgentOutcome]


@pytest.fixture
def make_spec(tmp_path: Path) -> SpecMaker:
    """Make an attempt whose agent is a command, or a script of `sh`; keywords replace fields."""

    def make(command: Sequence[str] | str = "true", **fields: Any) -> Spec:
        root = tmp_path / "project"
        root.mkdir(exist_ok=True)
        argv = ("sh", "-c", command) if isinstance(command, str) else tuple(command)
        settings = AgentSettings(cli="command", command=argv)
        return Spec(root, settings, os.urandom(4).hex(), asyncio.Event(), asyncio.Event())._replace(**fields)

    return make


def report_json(code: str = "phase_complete", **more: object) -> str:
    row = {"item_id": "WRK-001", "phase": "build", "result": code, "summary": "Did it", **more}
    return json.dumps(row)


def report(code: str = "phase_complete", **more: object) -> str:
    """Shell text that writes a result."""
    return f"printf '%s' {shlex.quote(report_json(code, **more))} > \"$ORCHESTRATOR_RESULT_PATH\""


def attempt(spec: Spec, sign: Path | None = None, *, hurry: bool = False, **more: Any) -> AgentOutcome:
    """Run an attempt; if `sign` is given, ask for the stop as soon as its agent has written that."""

    async def main() -> AgentOutcome:
        running = asyncio.create_task(run_attempt(*spec.both, spec.prompt, **more))
        if sign is not None:
            await appears(sign)
            spec.stop.set()
            if hurry:
                spec.hurry.set()
        return await running

    return asyncio.run(main())


async def appears(path: Path) -> None:
    """Wait until a child has written a whole line to a file."""
    while not path.exists() or not path.read_text().endswith("\n"):  # noqa: ASYNC110, ASYNC240 - another process writes it
        await asyncio.sleep(0.005)


def alive(path: Path) -> list[int]:
    """Those processes that live, of the ids in a file."""
    rows = [orchestrator.processes(int(word)).get(int(word)) for word in path.read_text().split()]
    return [one.pid for one in rows if one is not None and one.alive]


@contextlib.contextmanager
def ended_after(*children: subprocess.Popen[bytes]) -> Iterator[None]:
    """End processes of the test itself, by id, whatever happens."""
    with contextlib.ExitStack() as stack:
        for child in children:
            stack.enter_context(child)
            stack.callback(child.kill)
        yield


def logged(spec: Spec, name: str = "build-1.out") -> str:
    return (spec.root / ".orchestrator/logs/WRK-001" / name).read_text()


# ---- Start: prompt, environment, paths -----------------------------------------------------------


def test_prompt_arrives_on_stdin_from_a_regular_file(make_spec: SpecMaker) -> None:
    script = "import os,stat,sys; print(*(stat.S_ISREG(os.fstat(n).st_mode) for n in (0, 1, 2)), len(sys.stdin.buffer.read()))"
    spec = make_spec((sys.executable, "-S", "-E", "-c", script), prompt="é" * 150_000)  # more than an argument may hold
    outcome = attempt(spec)
    assert logged(spec) == "True True True 300000\n"
    assert spec.prompt_path.read_text() == spec.prompt
    assert outcome.detail == "no result file was written (exit code 0)\nLast output:\nTrue True True 300000"


def test_environment_is_cleaned_and_complete(make_spec: SpecMaker) -> None:
    foreign = {
        "GIT_DIR": "/x", "GIT_INDEX_FILE": "/y", "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "a.b",
        "GIT_CONFIG_VALUE_0": "c", "CLAUDECODE": "1", "CLAUDE_CODE_ENTRYPOINT": "cli",
        "CLAUDE_CODE_SESSION_ID": "s", "CODEX_SANDBOX": "seatbelt", "ORCHESTRATOR_ELSE": "old",
    }  # fmt: skip
    kept = {"GIT_SSH_COMMAND": "ssh -v", "CLAUDE_CODE_OAUTH_TOKEN": "secret", "CLAUDE_CODE_MAX_RETRIES": "9"}
    settings = AgentSettings(cli="claude", env={"EXTRA": "1", "PAGER": "less", "DISABLE_AUTOUPDATER": "0"})
    spec = make_spec(settings=settings, attempt=2)

    env = agent_environment(*spec.both, {**foreign, **kept, "ORCHESTRATOR_ITEM_ID": "OLD-1"})

    assert env == {
        **kept, "EXTRA": "1", "PAGER": "less", "DISABLE_AUTOUPDATER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
        "GIT_TERMINAL_PROMPT": "0", "GIT_EDITOR": "true", "GIT_PAGER": "cat",
        "ORCHESTRATOR_RUN_ID": "run-1", "ORCHESTRATOR_ITEM_ID": "WRK-001", "ORCHESTRATOR_PHASE": "build",
        "ORCHESTRATOR_ATTEMPT": "2", "ORCHESTRATOR_CHANGE_DIR": str(spec.change_dir),
        "ORCHESTRATOR_RESULT_PATH": f"{spec.root}/.orchestrator/results/WRK-001_build_{spec.token}.json",
        "ORCHESTRATOR_PROMPT_FILE": f"{spec.root}/.orchestrator/prompts/WRK-001_build_{spec.token}.md",
    }  # fmt: skip


@linux_only
def test_d39_agent_works_in_the_project_root_with_no_signal_blocked(make_spec: SpecMaker) -> None:
    """Its pid and start time are told."""
    spec = make_spec(f"pwd; cut -d' ' -f22 /proc/$$/stat; echo $$; grep SigBlk /proc/self/status; {report()}")
    told: list[tuple[int, int]] = []
    outcome = attempt(spec, started=lambda *pair: told.append(pair))
    assert outcome.kind == "result"
    where, start, pid, _, blocked = logged(spec).split()
    assert (where, told[0], int(blocked, 16)) == (str(spec.root), (int(pid), int(start)), 0)


def test_names_are_safe_and_the_logs_of_an_earlier_run_are_kept(make_spec: SpecMaker, tmp_path: Path) -> None:
    odd = make_spec(task=Task("../../etc", Phase("a/b c"), "main"), token="t")
    assert odd.result_path == odd.root / ".orchestrator/results/----etc_a-b-c_t.json"
    assert orchestrator.log_paths(tmp_path, Task("x\0y", Phase("é"), "main"), 1)[0] == tmp_path / ".orchestrator/logs/x-y/--1.out"
    for word in ("first", "second"):
        attempt(make_spec(f"echo {word}; echo {word}-err >&2"))
    root = make_spec().root / ".orchestrator"
    assert {path.name: path.read_text() for path in (root / "logs/WRK-001").iterdir()} == {
        "build-1.out": "first\n",
        "build-1.err": "first-err\n",
        "build-1.2.out": "second\n",
        "build-1.2.err": "second-err\n",
    }
    assert (root / ".gitignore").read_text() == "*\n"


COMMAND_LINES = {
    "claude": "claude -p --output-format stream-json --verbose --dangerously-skip-permissions --model M X",
    "codex": "codex exec --json --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox -m M X -",
    "opencode": "opencode run --format json --auto --title WRK-001:build -m M X",
    "gemini": "gemini --yolo --output-format stream-json -m M X",
}


def test_command_lines(make_spec: SpecMaker) -> None:
    for cli, words in COMMAND_LINES.items():
        bare = words.replace(" --model M", "").replace(" -m M", "").replace(" X", "")
        assert agent_argv(*make_spec(settings=AgentSettings(cli=cli, model="M", args=("X",))).both) == words.split()
        assert agent_argv(*make_spec(settings=AgentSettings(cli=cli)).both) == bare.split()
    words = "a {phase}:{item_id} {prompt_file} {result_path} {model} {other}"
    spec = make_spec(settings=AgentSettings(cli="command", model="{phase}", command=tuple(words.split()), args=("z",)))
    paths = [str(spec.prompt_path), str(spec.result_path)]
    assert agent_argv(*spec.both) == ["a", "build:WRK-001", *paths, "{phase}", "{other}", "z"]  # replaced in one pass


def test_agent_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("claude", "mine", "data.txt"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o644 if name == "data.txt" else 0o755)
    path = {"PATH": str(tmp_path)}

    def what(outer: dict[str, str] = path, **settings: Any) -> str | None:
        problem = orchestrator.agent_problem(AgentSettings(**settings), tmp_path, outer)
        assert problem is None or problem.remedy
        return problem and problem.what

    assert what(cli="demo") is None
    assert what(cli="codex") == "the agent 'codex' is not on PATH or not executable"
    assert what(cli="command", command=("mine",)) is None
    assert what(cli="command", command=("./mine", "x")) is None
    assert what(cli="command", command=("./data.txt",)) == "the agent './data.txt' is not on PATH or not executable"
    assert what({}, cli="command", command=("mine",), env=path) is None
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert what(cli="claude") == "claude refuses to work unattended as root"
    assert what(cli="claude", env={"IS_SANDBOX": "1"}) is None
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert what(cli="claude") is None


# ---- Judgement -----------------------------------------------------------------------------------

NUMBERS = "\n".join(str(n) for n in range(13, 31))
FOREIGN = 'the result file says item_id "WRK-2", expected "WRK-001"'
CLEAN = f"no result file was written (exit code 4)\nLast output:\n{NUMBERS}\nred\nlast"


@pytest.mark.parametrize(
    ("script", "limits", "kind", "detail"),
    [
        (report(), {}, "result", ""),
        (f"{report('blocked')}; exit 3", {}, "result", "result accepted in spite of: exit code 3"),
        (f'echo "{{" > "$ORCHESTRATOR_RESULT_PATH"; sleep 0.2; {report()}; exit 7', {}, "result", "result accepted in spite of: exit code 7"),
        (f"{report()}; sleep 120", {}, "result", "it went on after its result and was ended"),
        (f"{report(item_id='W')}; {report()}; sleep 120", {"timeout_s": 0.02}, "result", "it went on after its result and was ended"),
        ("seq 1 30; printf '\\033[31mred\\033[0m\\007\\n' >&2; printf last >&2; exit 4", {}, "failed", CLEAN),
        (f"echo working; {report(item_id='WRK-2')}", {}, "failed", f"{FOREIGN} (exit code 0)\nLast output:\nworking"),
        ("kill -SEGV $$", {}, "failed", "no result file was written (ended by SIGSEGV)"),
        ("echo busy; sleep 120", {"timeout_s": 0.1}, "failed", "timed out after 0.1 seconds\nLast output:\nbusy"),
        ("for n in 1 2 3 4; do echo $n >&2; sleep 0.05; done; sleep 120", {"idle_timeout_s": 0.2}, "failed",
         "timed out: no output for 0.2 seconds\nLast output:\n1\n2\n3\n4"),
    ],
    ids=["good", "bad exit", "unfinished", "lingers", "d58 limit", "tail", "other item", "signal", "time limit", "idle"],
)  # fmt: skip
def test_how_an_attempt_ends(make_spec: SpecMaker, script: str, limits: dict[str, float], kind: str, detail: str) -> None:
    outcome = attempt(make_spec(script, **limits))
    assert (outcome.kind, outcome.detail) == (kind, detail)
    assert (outcome.result is not None) == (kind == "result")


def test_what_cannot_be_started_cannot_work(make_spec: SpecMaker, tmp_path: Path) -> None:
    spec = make_spec(("./agent.txt",))
    (spec.root / "agent.txt").write_text("#!/bin/sh\n")
    words = "'no-such-agent' cannot be started: No such file or directory"
    assert attempt(make_spec(("no-such-agent", "x"))) == AgentOutcome("failed", detail=words, error=words, trouble="refused")
    assert attempt(spec).error == "'./agent.txt' cannot be started: Permission denied"
    missing = attempt(make_spec(root=tmp_path / "no"), started=lambda *_: (tmp_path / "no").rename(tmp_path / "yes"))
    assert missing.kind == "failed"
    (tmp_path / "file").write_text("")
    elsewhere = attempt(make_spec(root=tmp_path / "file" / "x"))
    assert (elsewhere.kind, elsewhere.trouble) == ("failed", "")
    assert str(tmp_path / "file") in elsewhere.detail


# ---- Shutdown ------------------------------------------------------------------------------------

LOOP = "while :; do sleep 0.01; done"


def test_d10_d12_stop_ends_the_agent_and_its_group_with_a_grace_for_tidying(make_spec: SpecMaker) -> None:
    child = f"trap 'sleep 0.1; echo tidied > child; exit' TERM; echo up > sign; {LOOP}"
    spec = make_spec(f"trap 'echo tidied > tidy; exit 0' TERM; sh -c {shlex.quote(child)} & {LOOP}")
    outcome = attempt(spec, spec.root / "sign")
    assert outcome._replace(seconds=0) == AgentOutcome("cancelled", detail="stopped before it reported a result")
    assert [(spec.root / name).read_text() for name in ("tidy", "child")] == ["tidied\n"] * 2


@pytest.mark.parametrize(("grace", "hurry"), [(FOREVER, True), (0.05, False)], ids=["hurry", "grace"])
def test_an_agent_that_ignores_term_is_killed(make_spec: SpecMaker, grace: float, hurry: bool) -> None:
    deaf = "sh -c 'trap \"\" TERM; setsid sleep 120 & echo $! >> pids; sleep 120' & sleep 0.02; echo $! $$ >> pids"
    spec = make_spec(f"trap '' TERM; {deaf}; cat pids > sign; {LOOP}", grace_s=grace)
    outcome = attempt(spec, spec.root / "sign", hurry=hurry)
    assert (outcome.kind, outcome.seconds < FOREVER / 2) == ("cancelled", True)
    assert alive(spec.root / "pids") == []
    late = spec._replace(root=spec.root / "empty")
    late.root.mkdir()
    assert attempt(late) == AgentOutcome("cancelled", detail="'sh' was not run: the run is stopping")
    assert list(late.root.iterdir()) == []


def test_exception_in_started_leaves_no_process(make_spec: SpecMaker, tmp_path: Path) -> None:
    def fail(pid: int, start: int) -> None:
        (tmp_path / "pid").write_text(str(pid))
        raise LookupError("journal")

    with pytest.raises(LookupError):
        attempt(make_spec("sleep 120"), started=fail)
    assert alive(tmp_path / "pid") == []


# ---- Survivors -----------------------------------------------------------------------------------

KINDS = (
    "sleep 120 & echo $! >> pids",
    "nohup sleep 120 >&- 2>&- & echo $! >> pids",
    "setsid sleep 120 & echo $! >> pids",
    "sh -c 'trap \"\" TERM HUP INT; sleep 120' & echo $! >> pids",
    "sh -c 'setsid sleep 120 & echo $! >> pids'",
    "(setsid sh -c '(echo $$ >> pids; exec sleep 120) &' &)",
    "env -i sleep 120 & echo $! >> pids",
    "env -i setsid sh -c 'echo $$ >> pids; exec sleep 120' &",
    "sh -c 'env -i setsid sh -c \"echo \\$\\$ >> pids; exec sleep 120\" &'",
)


@linux_only
def test_d12_nothing_survives_a_normal_exit(make_spec: SpecMaker) -> None:
    wait = f"while ! [ $(cat pids | wc -w) = {len(KINDS)} ]; do sleep 0.005; done"
    spec = make_spec("\n".join([*KINDS, wait, report()]))
    outcome = attempt(spec)
    assert (outcome.kind, outcome.detail) == ("result", "")
    assert alive(spec.root / "pids") == []


@pytest.mark.usefixtures("without_proc")
def test_without_proc_a_stop_works_too(make_spec: SpecMaker) -> None:
    spec = make_spec("env -i setsid sleep 120 & echo $$ $! > sign; sleep 120")
    assert attempt(spec, spec.root / "sign").kind == "cancelled"
    assert alive(spec.root / "sign") == []


@linux_only
def test_adopted_orphans_are_reaped_while_the_agent_works(make_spec: SpecMaker) -> None:
    """A tool that waits until its daemon is gone must not see our unreaped zombie."""
    daemon = "sh -c 'sleep 0.02 & echo $! > pid'; P=$(cat pid); while kill -0 $P 2>&-; do sleep 0.01; done"
    outcome = attempt(make_spec(f"{daemon}; {report()}", timeout_s=30))
    assert (outcome.kind, outcome.detail) == ("result", "")


@pytest.mark.slow
@linux_only
def test_attempts_side_by_side_leave_each_other_alone(make_spec: SpecMaker, tmp_path: Path) -> None:
    """Also one that has hidden whose it is; and git calls and hooks of ours beside them are spared."""
    hidden = "env -i setsid sleep 120 & echo $! >> {0}; sleep 0.3; echo up > {0}-sign"
    slow = "setsid sleep 120 & echo $! > a; " + hidden.format("a")
    first = make_spec(f"{slow}; while ! [ -e go ]; do sleep 0.01; done; kill -0 $(cat a) && {report()}")
    other = Task("WRK-002", Phase("build"), "main")
    second = make_spec(f"setsid sleep 120 & echo $! > b; {hidden.format('b')}", task=other)

    async def main() -> tuple[AgentOutcome, list[int]]:
        running = asyncio.create_task(run_attempt(*first.both, "Do it."))
        await appears(first.root / "a-sign")
        await run_attempt(*second.both, "Do it.")
        between = [len(alive(first.root / name)) for name in "ab"]
        (first.root / "go").write_text("")
        return await running, between

    ours = subprocess.Popen(["sleep", "120"], start_new_session=True)
    with ended_after(ours):
        outcome, between = asyncio.run(main())
        assert ours.poll() is None
    assert between == [2, 0]
    assert outcome.kind == "result"
    assert alive(first.root / "a") == []


@linux_only
def test_what_a_killed_run_left_is_ended(make_spec: SpecMaker, tmp_path: Path) -> None:
    env = agent_environment(*make_spec().both, os.environ)
    deaf = ["sh", "-c", "trap '' TERM; echo up; sleep 120"]
    tidy = ["sh", "-c", f"trap 'echo tidied > {tmp_path}/tidy; exit' TERM; echo up; {LOOP}"]
    mine = [subprocess.Popen(argv, env=env, stdout=subprocess.PIPE) for argv in (deaf, tidy)]
    other = subprocess.Popen(["sleep", "120"], env={**os.environ, "ORCHESTRATOR_RUN_ID": "run-10"})
    with ended_after(*mine, other):
        for child in mine:
            assert child.stdout
            child.stdout.readline()
        lines = orchestrator.end_processes("ORCHESTRATOR_RUN_ID=run-1", grace_s=0.2)
        assert other.poll() is None
        assert orchestrator.end_processes("ORCHESTRATOR_RUN_ID=run-1") == []
    assert f"process {mine[0].pid} (sh -c trap '' TERM; echo up; sleep 120)" in lines
    assert (tmp_path / "tidy").read_text() == "tidied\n"


def test_of_a_flood_the_end_is_read(play: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "BACKLOG_LIMIT", 1000)
    flood = events({"type": "result", "total_cost_usd": 1.0}) + "lost\n" * 1000
    outcome = play("claude", flood + events({"type": "result", "result": "The end"}))
    assert outcome.usage == Usage()  # the first event was not seen
    assert outcome.detail.endswith("\nlost\nThe end")


def test_what_an_agent_did_last_is_noted(make_spec: SpecMaker) -> None:
    site, made = make_spec("echo one; printf '\\033[1mtwo\\n\\n'").both
    asyncio.run(run_attempt(site, made, "Do it."))
    assert made.doing == "two"
    made.heard = time.monotonic() - 150
    assert re.fullmatch(r"says nothing since \d\d:\d\d \(2 min\), before: two", made.doing)


# ---- Agent CLIs, as recorded event streams -------------------------------------------------------


@pytest.fixture
def play(make_spec: SpecMaker, tmp_path: Path) -> Player:
    """Run an attempt whose CLI is a script on PATH that prints the given stream and exits."""

    def run(cli: str, stream: str, code: int = 0, *, result: bool = False) -> AgentOutcome:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "stream").write_text(stream)
        binary = tmp_path / "bin" / cli
        binary.write_text(f"#!/bin/sh\ncat '{tmp_path}/stream'\n{report() if result else ':'}\nexit {code}\n")
        binary.chmod(0o755)
        path = f"{binary.parent}:{os.environ['PATH']}"
        return attempt(make_spec(settings=AgentSettings(cli=cli, env={"PATH": path})))

    return run


def recorded(name: str) -> str:
    return (DATA / f"{name}.jsonl").read_text()


def events(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


COST = pytest.approx(0.018)
STEP = {"type": "step_finish", "part": {"tokens": {"input": 100, "output": 10, "cache": {"read": 5, "write": 2}}, "cost": 0.25}}
TWO_ENDS = (  # cost is cumulative over them, tokens are not
    {"type": "result", "is_error": True, "total_cost_usd": 0.5, "usage": {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 1}},
    {"type": "result", "is_error": False, "total_cost_usd": 0.75, "usage": {"input_tokens": 20, "output_tokens": 2}},
)


@pytest.mark.parametrize(
    ("cli", "stream", "usage"),
    [
        ("claude", recorded("claude-ok"), Usage(COST, 3000, 600)),
        ("claude", recorded("claude-two"), Usage(COST, 3000, 600)),
        ("claude", events(*TWO_ENDS), Usage(0.75, 35, 3)),
        ("codex", recorded("codex-ok"), Usage(None, 3000, 600)),
        ("gemini", recorded("gemini-ok"), Usage(None, 3000, 600)),
        ("opencode", recorded("opencode-ok"), Usage(COST, 3000, 600)),
        ("opencode", events(STEP, STEP), Usage(0.5, 214, 20)),
    ],
)
def test_good_ends_and_what_they_cost(play: Player, cli: str, stream: str, usage: Usage) -> None:
    outcome = play(cli, stream, result=True)
    assert (outcome.kind, outcome.detail, outcome.usage) == ("result", "", usage)


CALLED = {"type": "assistant", "message": {"content": [{"type": "tool_use", "name": "Bash", "input": {"command": "make"}}]}}
RECONNECTS = [{"type": "turn.started"}, {"type": "error", "message": "Reconnecting... 1/5"}, {"type": "turn.completed"}]
OK = recorded("claude-ok")
CUT = OK[: OK.rindex('{"type":"result"') + 40]


@pytest.mark.parametrize(
    ("cli", "stream", "code", "says"),
    [
        ("claude", OK, 0, "no result file was written (exit code 0)\nLast output:\nBash: echo work > work.txt\nWrite: /tmp"),
        ("claude", CUT, 143, "no result file was written (exit code 143); its events break off without a closing one\n"),
        ("claude", events(CALLED, {"type": "result", "subtype": "error_max_turns", "is_error": True}), 1,
         "no result file was written (exit code 1); it reports: error_max_turns\n"),
        ("claude", events(CALLED, {"type": "result", "is_error": True, "api_error_status": 500, "result": "API Error: 500"}), 1,
         "no result file was written (exit code 1); it reports: API Error: 500\n"),
        ("codex", events(*RECONNECTS), 0, "no result file was written (exit code 0)\n"),
    ],
    ids=["no result", "breaks off", "turns", "error after work", "reconnects"],
)  # fmt: skip
def test_an_attempt_that_worked_and_left_no_result_failed(play: Player, cli: str, stream: str, code: int, says: str) -> None:
    outcome = play(cli, stream, code)
    assert (outcome.kind, outcome.trouble, outcome.error) == ("failed", "", "")
    assert outcome.detail.startswith(says)
    assert stream != CUT or outcome.usage == Usage(None, 3000, 3)


@pytest.mark.parametrize("cli", ["claude", "codex", "opencode", "gemini"])
def test_odd_events_are_survived(play: Player, cli: str) -> None:
    odd = [
        "{", "[]", "null", "{}", "[" * 5000, '{"type":' + "[" * 100_000, "\x00\xff", "{" + "x" * 2_000_000,
        '{"type":"result","total_cost_usd":NaN,"usage":{"input_tokens":1e999,"output_tokens":-4}}',
        '{"type":"result","total_cost_usd":"1","usage":[],"permission_denials":{"a":1}}',
        '{"type":"assistant","message":[1],"error":7}', '{"type":"assistant","message":{"content":[1,{"type":"tool_use"}]}}',
        '{"type":"rate_limit_event"}', '{"type":7}', '{"type":"item.completed","item":3}',
        '{"type":"step_finish","part":{"tokens":null,"cost":true}}', '{"type":"error","error":{}}',
        '{"type":"turn.failed"}', '{"type":"tool_use","part":{"state":1},"parameters":"x"}',
    ]  # fmt: skip
    outcome = play(cli, "\n".join(odd))
    assert (outcome.kind, outcome.usage) == ("failed", Usage())
    assert len(outcome.detail) < 12_000


# ---- Errors of the CLI's own ---------------------------------------------------------------------


def claude_end(text: str = "", **more: object) -> dict[str, object]:
    return {"type": "result", "subtype": "success", "is_error": True, "result": text, **more}


def codex_end(text: str) -> list[dict[str, object]]:
    return [{"type": "turn.started"}, {"type": "error", "message": text}, {"type": "turn.failed", "error": {"message": text}}]


def opencode_end(text: str, name: str = "APIError", status: int | None = None) -> dict[str, object]:
    return {"type": "error", "error": {"name": name, "data": {"message": text, "statusCode": status}}}


def gemini_end(text: str) -> dict[str, object]:
    return {"type": "result", "status": "error", "error": {"message": text}}


SPOKE = {"type": "assistant", "error": "billing_error", "message": {"content": [{"type": "text", "text": "Credit balance is too low"}]}}
OVER_RATE = "Rate limit reached for gpt-5 in organization org-1 on tokens per min (TPM): Limit 30000. Add a payment method at …"
POLICY = "API Error: Claude Code is unable to respond to this request, which appears to violate our Usage Policy"
NO_WORD = "claude gave no reason (exit code {}); its output is in .orchestrator/logs/WRK-001/build-1.out"
ENDS = [  # a recording, or events; the exit code; what it is about; what it says
    ("claude", "claude-limit", 1, "limited", "usage limit reached (five_hour); resets at 2027-01-15 08:00 UTC"),
    ("claude", "claude-429", 1, "busy", "API Error: Request rejected (429) · slow down"),
    ("claude", "claude-529", 1, "busy", "API Error: 529 "),
    ("claude", "claude-offline", 1, "busy", "API Error: Unable to connect to API."),
    ("claude", "claude-killed", 1, "busy", NO_WORD.format(1)),
    ("claude", "claude-nologin", 1, "refused", "Not logged in · Please run /login"),
    ("claude", "claude-401", 1, "refused", "Failed to authenticate. API Error: 401 "),
    ("claude", "claude-budget", 1, "failed", ""),
    ("claude", [SPOKE], 1, "refused", "Credit balance is too low"),
    ("claude", [claude_end("There's an issue with the selected model (x). It may not exist", api_error_status=404)], 1, "refused", "There's an"),
    ("claude", [claude_end("This organization has been disabled.", api_error_status=400)], 1, "refused", "This"),
    ("claude", [claude_end("Prompt is too long", api_error_status=400)], 1, "item", "Prompt is too long"),
    ("claude", [claude_end("Request too large (max 32MB).", api_error_status=413)], 1, "item", "Request"),
    ("claude", [claude_end(POLICY, api_error_status=400)], 1, "item", "API Error"),
    ("claude", [claude_end("Context limit reached · /compact or /clear to continue")], 1, "item", "Context"),
    ("claude", [claude_end("Request exceeded the token limit")], 0, "busy", "Request"),
    ("claude", [claude_end("This file is over the token usage limit")], 0, "busy", "This file"),
    ("claude", [claude_end("Words that nobody has seen yet")], 0, "busy", "Words that nobody has seen yet"),
    ("claude", [claude_end("", num_turns=0)], 0, "busy", NO_WORD.format(0)),
    ("claude", [CALLED, claude_end("5-hour limit reached ∙ resets 3pm")], 1, "limited", "5-hour limit"),  # after work, too
    ("codex", "codex-limit", 1, "limited", "You’ve hit your usage limit."),
    ("codex", "codex-429", 1, "busy", "exceeded retry limit, last status: 429 Too Many Requests"),
    ("codex", "codex-401", 1, "refused", "unexpected status 401 Unauthorized: bad key"),
    ("codex", codex_end("Selected model is at capacity. Please try a different model."), 0, "busy", "Selected model is at capacity."),
    ("codex", codex_end(OVER_RATE), 1, "busy", "Rate limit"),
    ("codex", codex_end("Codex ran out of room in the model's context window. Start a new thread."), 1, "item", "Codex"),
    ("codex", codex_end("The 'x' model is not supported when using Codex with a ChatGPT account."), 1, "refused", "The 'x'"),
    ("opencode", "opencode-401", 1, "refused", "APIError: bad key"),
    ("opencode", "opencode-429", 1, "busy", "APIError: slow down"),
    ("opencode", "opencode-offline", 1, "busy", "APIError: Cannot connect to API"),
    ("opencode", [opencode_end("quota exceeded", status=429)], 1, "limited", "APIError: quota exceeded"),
    ("opencode", [opencode_end("m", "ProviderAuthError")], 1, "refused", "ProviderAuthError: m"),
    ("opencode", [opencode_end("m", status=500)], 1, "busy", "APIError: m"),
    ("opencode", [opencode_end("m", status=400)], 1, "busy", "APIError: m"),
    ("gemini", "gemini-limit", 1, "limited", "[API Error: You have exhausted your daily quota on this model.]"),
    ("gemini", "gemini-offline", 1, "busy", "[API Error: exception TypeError: fetch failed"),
    ("gemini", "gemini-killed", 1, "failed", ""),
    ("gemini", [gemini_end("The input token count (1200000) exceeds the maximum number of tokens allowed")], 144, "item", "The input"),
    *(("gemini", [gemini_end(text)], 1, "busy", text) for text in (
        "fetch failed", "Error: 400 Request contains an invalid argument.", "see the log in /home/x", "Authenticated as bob",
        "getaddrinfo ENOTFOUND login.example.com", "Sign in with Google", "https://x/authenticate")),
    *(("gemini", [gemini_end(text)], 1, "refused", text) for text in (
        "Please log in", "You must sign in first", "Not authenticated", "Failed to authenticate", "authentication_error", "Unknown argument: x")),
    ("gemini", [{"type": "init"}], 173, "busy", "gemini gave no reason"),
    ("gemini", [{"type": "init"}], 41, "refused", "gemini gave no reason"),
    ("gemini", [{"type": "init"}], 55, "refused", "gemini gave no reason"),
]  # fmt: skip


@pytest.mark.parametrize(("cli", "told", "code", "kind", "says"), ENDS, ids=[f"{row[0]}-{row[3]}" for row in ENDS])
def test_d50_what_an_error_is_about(play: Player, cli: str, told: Any, code: int, kind: str, says: str) -> None:
    outcome = play(cli, recorded(told) if isinstance(told, str) else events(*told), code)
    assert (outcome.trouble or outcome.kind) == kind
    assert outcome.error.removeprefix(f"{cli}: ").startswith(says)
    assert bool(outcome.error) == bool(says)


def test_what_is_no_limit(play: Player) -> None:
    """Prose, warnings, a limit that is over, one beside a result."""
    words = "Error 429: you hit your usage limit, quota exceeded. Not logged in. 401 Unauthorized"
    said = {"type": "assistant", "message": {"id": "m", "content": [{"type": "text", "text": words}]}}
    done = {"type": "result", "subtype": "success", "is_error": False, "result": words}
    kinds = ("allowed", "allowed_warning", "paused", "throttled", "exceeded")
    warnings = [{"type": "rate_limit_event", "rate_limit_info": {"status": kind, "resetsAt": 1}} for kind in kinds]
    item = {"type": "item.completed", "item": {"type": "agent_message", "text": words}}
    echo = {"type": "message", "role": "user", "content": words}
    limit = recorded("claude-limit")
    rejected = "".join(line for line in limit.splitlines(keepends=True) if '"rejected"' in line)
    assert rejected

    assert [
        play("claude", events(said, *warnings, done)).kind,
        play("codex", events(item, {"type": "turn.completed", "usage": {}})).kind,
        play("gemini", events(echo, {"type": "result", "status": "success"})).kind,
        play("opencode", events({"type": "text", "part": {"text": words}})).kind,
        play("claude", rejected + OK).kind,
    ] == ["failed"] * 5
    assert play("claude", limit, 1, result=True).kind == "result"


@pytest.mark.parametrize("cli", ["claude", "gemini", "mine"])
def test_a_cli_that_exits_at_once_says_why_on_standard_error(make_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: str) -> None:
    """Usage limits are read from events alone: on standard error anybody may speak of one."""
    binary = tmp_path / cli
    settings = AgentSettings(cli=cli, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    if cli == "mine":
        settings = AgentSettings(cli="command", command=(str(binary),))
    told = []
    for words in ("error: unknown option --foo\nsee --help", "Traceback", "usage limit reached", ""):
        binary.write_text(f"#!/bin/sh\nprintf '%s\\n' '{words}' >&2\nexit 3\n")
        binary.chmod(0o755)
        outcome = attempt(make_spec(settings=settings))
        assert outcome.kind == "failed"
        told.append((outcome.trouble, outcome.error))

    silent = f"{cli} gave no reason (exit code 3); its output is in .orchestrator/logs/WRK-001/build-1"
    assert told[0] == ("refused", f"{cli}: error: unknown option --foo")
    assert told[1:] == [("busy", f"{cli}: Traceback"), ("busy", f"{silent}.3.out"), ("busy", f"{silent}.4.out")]
    monkeypatch.setattr(orchestrator, "EARLY_S", 0.0)  # a command that worked a while has failed at its work
    assert (attempt(make_spec(settings=settings)).trouble == "") == (cli == "mine")


@contextlib.contextmanager
def local_zone(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", name)
        time.tzset()
        yield
    time.tzset()


RESETS = [
    ("You’ve hit your usage limit, try again at 5:13 PM.", "2026-11-22T17:13"), ("try again at 12:05 AM", "2026-11-23T00:05"),
    ("try again at 11:59 AM", "2026-11-22T11:59"),  # just passed: not tomorrow's
    ("try again at Nov 25th, 2026 2:10 AM.", "2026-11-25T02:10"), ("try again at Apr 28th, 2026 10:03 PM", "2026-04-28T22:03"),
    ("resets 4:10am (America/Sao_Paulo)", "2026-11-23T09:10"), ("resets 1pm", "2026-11-22T13:00"),
    ("resets Dec 6, 1pm (Europe/Berlin)", "2026-12-06T14:00"), ("resets Jan 2, 1pm", "2027-01-02T13:00"),
    ("resets Jan 15, 2027, 8am (UTC)", "2027-01-15T10:00"), ("resets at 23:30 UTC", "2026-11-23T01:30"),
    ("Your limit will reset at 3pm (America/New_York).", "2026-11-22T22:00"),
    ("You will regain access on 2026-12-01 at 00:00 UTC.", "2026-12-01T02:00"),
    ("Claude AI usage limit reached|1795345200", "2026-11-22T13:00"), ("Please retry in 90.5s", "2026-11-22T12:02"),
    ("resets at 22:03 Z", "2026-11-23T00:03"), ("retry after 1 hr 2 mins and 3 secs", "2026-11-22T13:02"),
    ("Try again in 3 days 4 hours 12 minutes.", "2026-11-25T16:12"), ("Your quota will reset after 17h43m51s.", "2026-11-23T05:44"),
    *((text, None) for text in ("resets 4:10am (Nowhere/Atlantis)", "resets 10", "try again at 25:99 PM",
      "try again at Foo 25th, 2026 2:10 AM.", "try again later", "Try again in 2 more hours", "retry in 500ms")),
]  # fmt: skip


def test_reset_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_zone(monkeypatch, "Africa/Johannesburg"):  # two hours ahead, all year
        now = datetime(2026, 11, 22, 12, 0, 30).timestamp()
        found = [(text, orchestrator.reset_time(text, now)) for text, _ in RESETS]
        assert [(text, at and datetime.fromtimestamp(at).isoformat()[:16]) for text, at in found] == RESETS
    with local_zone(monkeypatch, "Europe/Berlin"):  # beyond a change of the clocks
        found_at = orchestrator.reset_time("resets Oct 26, 9am", datetime(2026, 10, 20, 12).timestamp())
        assert found_at == datetime(2026, 10, 26, 8, tzinfo=UTC).timestamp()


# ---- A result without its file, and work that is not done ----------------------------------------


def closing(cli: str, text: str) -> list[object]:
    """A good end of a CLI whose closing message is `text`."""
    codex = {"type": "item.completed", "item": {"id": "i", "type": "agent_message", "text": text}}
    return {
        "claude": [{"type": "result", "subtype": "success", "is_error": False, "result": text}],
        "codex": [codex, {"type": "turn.completed", "usage": {}}],
        "opencode": [{"type": "text", "part": {"text": text}}, {"type": "step_finish", "part": {"reason": "stop"}}],
        "gemini": [
            *({"type": "message", "role": "assistant", "content": half, "delta": True} for half in (text[:40], text[40:])),
            {"type": "result", "status": "success"},
        ],
    }[cli]  # fmt: skip


LATE = {  # what comes after the end opens nothing …
    "claude": [{"type": "system", "subtype": "status"}, {"type": "rate_limit_event"}],
    "codex": [{"type": "item.completed", "item": {"id": "j", "type": "reasoning"}}],
    "opencode": [{"type": "text", "part": {"text": "Bye."}}],
    "gemini": [{"type": "message", "role": "user", "content": "Bye."}],
}
OPENS = {  # … but for this
    "claude": {"type": "assistant"}, "codex": {"type": "turn.started"}, "opencode": {"type": "step_start"}, "gemini": {"type": "init"},
}  # fmt: skip
FENCED = f"All done {{really}}.\n\n```json\n{json.dumps(json.loads(report_json()), indent=2)}\n```\nBye."


@pytest.mark.parametrize("cli", ["claude", "codex", "opencode", "gemini"])
def test_the_result_in_a_closing_message_is_taken_with_a_warning(play: Player, cli: str) -> None:
    result = play(cli, events(*closing(cli, FENCED))).result
    assert result is not None
    assert (result.result, result.summary) == ("phase_complete", "Did it")
    assert result.warnings == ("no result file was written; its closing message held the result",)
    ended = [*closing(cli, FENCED), *LATE[cli]]
    assert play(cli, events(*ended)).kind == "result"
    assert play(cli, events(*ended, OPENS[cli])).kind == "failed"


@pytest.mark.parametrize(
    ("text", "code", "kind"),
    [
        (report_json(item_id="WRK-2") + FENCED, 0, "result"),
        (FENCED, 1, "failed"),
        (FENCED + FENCED, 0, "failed"),
        (report_json("finished"), 0, "failed"),
        ('[] {"item_id": "WRK-001"}', 0, "failed"),
        ("{" * 1_500, 0, "failed"),
        ('{"item_id": "WRK-001", ' * 300, 0, "failed"),
    ],
    ids=["beside another", "bad exit", "twice", "odd word", "incomplete", "nested", "cut off"],
)
def test_only_one_right_result_of_a_good_end_is_taken(play: Player, text: str, code: int, kind: str) -> None:
    assert play("claude", events(*closing("claude", text)), code).kind == kind
    assert code or play("claude", events(claude_end(text))).kind == "failed"


CLAUDE_TASK = {"type": "user", "tool_use_result": {"stdout": "", "backgroundTaskId": "b1"}}
CLAUDE_AGENT = {"type": "user", "tool_use_result": {"status": "async_launched", "agentId": "b1"}}
CLAUDE_NAMED = {"type": "system", "subtype": "task_started", "task_id": "b1", "description": "run the tests"}
TOLD = {"type": "system", "subtype": "task_updated", "task_id": "b1", "patch": {"status": "running"}}
OVER = {"type": "system", "subtype": "task_notification", "task_id": "b1", "status": "completed"}
COMMAND = {"id": "item_1", "type": "command_execution", "command": "run the tests"}


@pytest.mark.parametrize(
    ("cli", "rows", "end"),
    [
        ("claude", [CLAUDE_TASK, CLAUDE_NAMED, TOLD], OVER),
        ("claude", [CLAUDE_NAMED, CLAUDE_AGENT], OVER),
        ("codex", [{"type": "item.started", "item": COMMAND}], {"type": "item.completed", "item": COMMAND}),
    ],
    ids=["claude command", "claude agent", "codex"],
)
def test_work_that_still_runs_in_the_background_is_not_done(play: Player, cli: str, rows: list[object], end: object) -> None:
    outcome = play(cli, events(*rows, *closing(cli, "Waiting.")), result=True)
    assert (outcome.kind, outcome.trouble, outcome.result) == ("failed", "", None)
    assert outcome.detail.startswith("it ended while this was still running in the background: run the tests (exit code 0)\n")
    assert play(cli, events(*rows, end, *closing(cli, ".")), result=True).kind == "result"  # it was waited for


def test_background_work_of_a_recorded_claude(play: Player) -> None:
    """It says so, waits, and takes another turn; here it is cut off after the first."""
    first, ends, _ = recorded("claude-two").partition('"type":"result"')
    outcome = play("claude", first + ends + recorded("claude-two")[len(first + ends) :].partition("\n")[0] + "\n", result=True)
    assert outcome.detail.startswith("it ended while this was still running in the background: do it (exit code 0)\n")


def test_a_phase_that_is_a_command_ends_by_its_exit_code(make_spec: SpecMaker) -> None:
    def run(*argv: str, **limits: float) -> AgentOutcome:
        task = Task("WRK-001", Phase("check", run=argv), "main")
        return attempt(make_spec(("no-such-agent",), task=task, **limits))

    done = run("sh", "-c", "cat; echo fine")
    assert done.result is not None
    assert (done.result.result, done.result.summary) == ("phase_complete", "`sh -c 'cat; echo fine'` succeeded")
    assert (done.result.item_id, done.result.phase) == ("WRK-001", "check")
    failed = run("sh", "-c", "echo broken >&2; exit 9")
    assert (failed.kind, failed.trouble) == ("failed", "")
    assert failed.detail == "`sh -c 'echo broken >&2; exit 9'` failed with exit code 9\nLast output:\nbroken"
    assert run("sleep", "120", idle_timeout_s=0.1).detail == "`sleep 120` timed out: no output for 0.1 seconds"
    assert run("sleep", "120", timeout_s=0.1).detail == "`sleep 120` ran out of time"
    missing = run("no-such-command")
    assert (missing.kind, missing.trouble) == ("failed", "")  # nobody blames the agent
    assert missing.detail == "`no-such-command` cannot be started: No such file or directory"
