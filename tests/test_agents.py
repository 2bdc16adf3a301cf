"""Agent processes: real children, real signals; agent CLIs appear as recorded event streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

import orchestrator
from orchestrator import (
    AgentOutcome,
    AgentSettings,
    AgentTiming,
    AttemptSpec,
    Phase,
    Progress,
    Task,
    Usage,
    agent_argv,
    agent_environment,
    agent_problem,
    become_subreaper,
    demo_agent,
    end_run,
    log_paths,
    process_entry,
    prompt_path,
    reset_time,
    result_path,
    run_attempt,
    run_verify,
)

DATA = Path(__file__).parent / "data" / "agents"
QUICK = AgentTiming(poll_s=0.01, settle_s=0.05, around_s=0.1, kill_poll_s=0.01)
FOREVER = 120.0  # seconds; longer than any test may take
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and subreaping")


# ---- Making attempts -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def subreaper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs as the orchestrator does: orphans become children of this process."""
    monkeypatch.delenv("ORCHESTRATOR_PID", raising=False)
    if sys.platform == "linux":
        monkeypatch.setenv("ORCHESTRATOR_PID", "")  # so that it is restored after the test
        assert become_subreaper()
    yield
    assert orchestrator.LIVE == {}
    if sys.platform == "linux":
        leave_subreaping()


def leave_subreaping() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
    os.environ.pop("ORCHESTRATOR_PID", None)


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system without /proc and without subreaping: `ps` and waiting threads."""
    if sys.platform == "linux":
        leave_subreaping()
    monkeypatch.setattr(orchestrator, "ON_LINUX", False)


SpecMaker = Callable[..., AttemptSpec]


@pytest.fixture
def make_spec(tmp_path: Path) -> SpecMaker:
    """Make an attempt whose agent is a command; keywords replace fields of the spec."""

    def make(command: Sequence[str] = ("true",), **fields: object) -> AttemptSpec:
        root = tmp_path / "project"
        root.mkdir(exist_ok=True)
        spec = AttemptSpec(
            run_id="run-1",
            task=Task("WRK-001", Phase("build"), "main"),
            attempt=1,
            token=f"t{os.urandom(4).hex()}",
            root=root,
            prompt="Do it.\n",
            change_dir=root / "changes" / "WRK-001_x",
            settings=AgentSettings(cli="command", command=tuple(command)),
            timeout_s=FOREVER,
            idle_timeout_s=0,
            grace_s=FOREVER,
        )
        return spec._replace(**fields)

    return make


def sh(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


def py(script: str) -> tuple[str, ...]:
    """A child in Python that imports only what it says; started without site to be quick."""
    return (sys.executable, "-S", "-E", "-c", script)


def report_json(code: str = "phase_complete", **more: object) -> str:
    return json.dumps(
        {"item_id": "WRK-001", "phase": "build", "result": code, "summary": "Did it", **more}
    )


def report(code: str = "phase_complete", **more: object) -> str:
    """Shell text that writes a result."""
    return f"printf '%s' {shlex.quote(report_json(code, **more))} > \"$ORCHESTRATOR_RESULT_PATH\""


class Conductor:
    """Runs attempts on an event loop and lets a test act when a file appears."""

    def __init__(self) -> None:
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        self.pids: list[int] = []
        self.progress: list[Progress] = []

    async def attempt(self, spec: AttemptSpec, timing: AgentTiming = QUICK) -> AgentOutcome:
        return await run_attempt(
            spec,
            stop=self.stop,
            hurry=self.hurry,
            started=lambda pid, start: self.pids.append(pid),
            progress=self.progress.append,
            timing=timing,
        )


def attempt(spec: AttemptSpec, timing: AgentTiming = QUICK) -> AgentOutcome:
    async def main() -> AgentOutcome:
        return await Conductor().attempt(spec, timing)

    return asyncio.run(main())


def is_written(path: Path) -> bool:
    return path.exists() and path.read_text().endswith("\n")


async def appears(path: Path) -> None:
    """Wait until a child has written a whole line to a file."""
    while not is_written(path):  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.005)


def stop_when(spec: AttemptSpec, sign: Path, *, hurry: bool = False) -> AgentOutcome:
    """Run an attempt and ask for the stop as soon as its agent has written `sign`."""

    async def main() -> AgentOutcome:
        conductor = Conductor()
        running = asyncio.create_task(conductor.attempt(spec))
        await appears(sign)
        conductor.stop.set()
        if hurry:
            conductor.hurry.set()
        return await running

    return asyncio.run(main())


def alive(pid: int) -> bool:
    entry = process_entry(pid)
    return entry is not None and entry.alive


def pids_in(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()]


@contextlib.contextmanager
def ended_after(*pids: int) -> Iterator[None]:
    """End processes of the test itself, by id, whatever happens."""
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# ---- Start: prompt, environment, paths -----------------------------------------------------------


def test_prompt_arrives_on_stdin_from_a_regular_file(make_spec: SpecMaker) -> None:
    script = (
        "import os,stat,sys; print(stat.S_ISREG(os.fstat(0).st_mode), len(sys.stdin.buffer.read()),"
        " stat.S_ISREG(os.fstat(1).st_mode), stat.S_ISREG(os.fstat(2).st_mode))"
    )
    spec = make_spec(py(script), prompt="é" * 150_000)  # 300 kB: more than an argument may hold
    out, err = log_paths(spec.root, "WRK-001", "build", 1)

    outcome = attempt(spec)

    assert out.read_text() == "True 300000 True True\n"
    assert err.read_bytes() == b""
    assert prompt_path(spec.root, "WRK-001", "build", spec.token).read_text() == spec.prompt
    assert outcome.kind == "failed"
    assert outcome.detail == (
        "no result file was written (exit code 0)\nLast output:\nTrue 300000 True True"
    )


def test_environment_is_cleaned_and_complete(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = {
        "GIT_DIR": "/x", "GIT_INDEX_FILE": "/y", "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "a.b",
        "GIT_CONFIG_VALUE_0": "c", "CLAUDECODE": "1", "CLAUDE_CODE_ENTRYPOINT": "cli",
        "CLAUDE_CODE_SESSION_ID": "s", "CODEX_SANDBOX": "seatbelt", "ORCHESTRATOR_ITEM_ID": "OLD-1",
        "ORCHESTRATOR_ELSE": "old",
    }  # fmt: skip
    kept = {"GIT_SSH_COMMAND": "ssh -v", "CLAUDE_CODE_OAUTH_TOKEN": "secret", "GIT_AUTHOR_NAME": "Me"}
    settings = AgentSettings(cli="command", command=("env", "-0"), env={"EXTRA": "1", "PAGER": "less"})
    for name, value in {**foreign, **kept}.items():
        monkeypatch.setenv(name, value)
    spec = make_spec(settings=settings, attempt=2)

    attempt(spec)

    text = log_paths(spec.root, "WRK-001", "build", 2)[0].with_name("build-2.out").read_text()
    env = dict(pair.split("=", 1) for pair in text.rstrip("\0").split("\0"))
    ours = {name: value for name, value in env.items() if name.startswith("ORCHESTRATOR_")}
    assert ours == {
        "ORCHESTRATOR_RUN_ID": "run-1",
        "ORCHESTRATOR_ITEM_ID": "WRK-001",
        "ORCHESTRATOR_PHASE": "build",
        "ORCHESTRATOR_ATTEMPT": "2",
        "ORCHESTRATOR_RESULT_PATH": str(result_path(spec.root, "WRK-001", "build", spec.token)),
        "ORCHESTRATOR_PROMPT_FILE": str(prompt_path(spec.root, "WRK-001", "build", spec.token)),
        "ORCHESTRATOR_CHANGE_DIR": str(spec.change_dir),
    }
    assert {name: env[name] for name in kept} == kept
    assert [name for name in foreign if name in env] == ["ORCHESTRATOR_ITEM_ID"]
    told = {name: env[name] for name in ("GIT_TERMINAL_PROMPT", "GIT_EDITOR", "PAGER", "EXTRA")}
    assert told == {"GIT_TERMINAL_PROMPT": "0", "GIT_EDITOR": "true", "PAGER": "less", "EXTRA": "1"}


def test_operators_environment_beats_the_profiles(make_spec: SpecMaker) -> None:
    spec = make_spec(settings=AgentSettings(cli="claude", env={"DISABLE_AUTOUPDATER": "0"}))

    env = agent_environment(spec, {"CLAUDE_CODE_MAX_RETRIES": "9"})

    assert (env["CLAUDE_CODE_MAX_RETRIES"], env["DISABLE_AUTOUPDATER"]) == ("9", "0")


def test_d39_agent_works_in_the_project_root_with_absolute_paths(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = make_spec(sh(f"pwd; {report()}"))

    outcome = attempt(spec)

    assert outcome.kind == "result"
    written = (spec.root / ".orchestrator/logs/WRK-001/build-1.out").read_text()
    assert written == f"{spec.root}\n"


def test_signals_are_not_blocked_in_the_agent(make_spec: SpecMaker) -> None:
    spec = make_spec(py("import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"))

    attempt(spec)

    assert (spec.root / ".orchestrator/logs/WRK-001/build-1.out").read_text() == "set()\n"


def test_names_are_made_safe_for_paths(tmp_path: Path) -> None:
    base = tmp_path / ".orchestrator"
    assert result_path(tmp_path, "../../etc", "a/b c", "t") == base / "results/----etc_a-b-c_t.json"
    assert prompt_path(tmp_path, "", "..", "t") == base / "prompts/-_-_t.md"
    assert log_paths(tmp_path, "x\0y", "é", 1)[0] == base / "logs/x-y/--1.out"


def test_logs_of_an_earlier_run_are_kept(make_spec: SpecMaker) -> None:
    for word in ("first", "second"):
        attempt(make_spec(sh(f"echo {word}; echo {word}-err >&2")))

    folder = make_spec().root / ".orchestrator/logs/WRK-001"
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert texts == {
        "build-1.out": "first\n",
        "build-1.err": "first-err\n",
        "build-1.2.out": "second\n",
        "build-1.2.err": "second-err\n",
    }
    assert (make_spec().root / ".orchestrator/.gitignore").read_text() == "*\n"


def test_started_tells_pid_and_start_time(make_spec: SpecMaker) -> None:
    seen: list[tuple[int, int]] = []
    spec = make_spec(sh("cut -d' ' -f22 /proc/$$/stat; echo $$"))

    async def main() -> None:
        events = {"stop": asyncio.Event(), "hurry": asyncio.Event()}
        started = lambda pid, start: seen.append((pid, start))  # noqa: E731
        await run_attempt(spec, **events, started=started, timing=QUICK)

    asyncio.run(main())
    start, pid = pids_in(spec.root / ".orchestrator/logs/WRK-001/build-1.out")
    assert seen[0] == (pid, start)


# ---- Judgement -----------------------------------------------------------------------------------


def test_valid_result_is_the_outcome(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(sh(report(follow_ups=["More"]))))

    assert outcome.kind == "result"
    assert outcome.result is not None
    assert (outcome.result.result, outcome.result.summary) == ("phase_complete", "Did it")
    assert [f.title for f in outcome.result.follow_ups] == ["More"]
    assert outcome.detail == ""


def test_valid_result_counts_in_spite_of_a_bad_exit(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(sh(f"{report('blocked')}; exit 3")))

    assert outcome.result is not None
    assert outcome.result.result == "blocked"
    assert outcome.detail == "result accepted in spite of: exit code 3"


def test_failure_tells_exit_code_and_clean_tail(make_spec: SpecMaker) -> None:
    script = "seq 1 30; printf '\\033[31mred\\033[0m\\007\\n' >&2; printf last >&2; exit 4"

    outcome = attempt(make_spec(sh(script)))

    numbers = "\n".join(str(n) for n in range(13, 31))
    assert outcome.kind == "failed"
    assert outcome.detail == (
        f"no result file was written (exit code 4)\nLast output:\n{numbers}\nred\nlast"
    )


def test_failure_names_the_signal(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(sh("kill -SEGV $$")))

    assert outcome.detail == "no result file was written (ended by SIGSEGV)"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        ('ln -s /etc/passwd "$R"', "it is a symbolic link"),
        ('mkdir "$R"', "Is a directory"),
        ('mkfifo "$R"', "it is no regular file"),
        ('head -c 5000001 /dev/zero > "$R"', "more than 5000000"),
        ('echo "{" > "$R"', ""),
        (report(phase="design").replace("ORCHESTRATOR_RESULT_PATH", "R"), "design"),
        (report(item_id="WRK-2").replace("ORCHESTRATOR_RESULT_PATH", "R"), "WRK-2"),
    ],
    ids=["symlink", "directory", "fifo", "huge", "broken", "other-phase", "other-item"],
)
def test_unusable_result_file_fails_the_attempt(make_spec: SpecMaker, make: str, said: str) -> None:
    outcome = attempt(make_spec(sh(f'R="$ORCHESTRATOR_RESULT_PATH"; echo working; {make}')))

    assert (outcome.kind, outcome.result) == ("failed", None)
    assert said in outcome.detail
    assert "no result file was written" not in outcome.detail
    assert outcome.detail.endswith("(exit code 0)\nLast output:\nworking")


def test_missing_command_cannot_work(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(("no-such-agent", "x")))

    words = "'no-such-agent' cannot be started: No such file or directory"
    assert outcome == AgentOutcome("failed", detail=words, error=words, trouble="refused")


def test_command_that_may_not_be_executed_cannot_work(make_spec: SpecMaker) -> None:
    spec = make_spec(("./agent.txt",))
    (spec.root / "agent.txt").write_text("#!/bin/sh\n")

    outcome = attempt(spec)

    assert (outcome.kind, outcome.trouble) == ("failed", "refused")
    assert outcome.detail == "'./agent.txt' cannot be started: Permission denied"


def test_missing_root_is_no_fault_of_the_agent(make_spec: SpecMaker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = attempt(make_spec(root=tmp_path / "file" / "x"))

    assert outcome.kind == "failed"
    assert str(tmp_path / "file") in outcome.detail


def test_placeholders_are_filled_in_one_pass(make_spec: SpecMaker) -> None:
    words = ("a", "{phase}:{item_id}", "{prompt_file}", "{result_path}", "{model}", "{other}")
    settings = AgentSettings(cli="command", model="{phase}", command=words, args=("z",))
    spec = make_spec(settings=settings)

    assert agent_argv(spec) == [
        "a",
        "build:WRK-001",
        str(prompt_path(spec.root, "WRK-001", "build", spec.token)),
        str(result_path(spec.root, "WRK-001", "build", spec.token)),
        "{phase}",
        "{other}",
        "z",
    ]


# ---- Shutdown ------------------------------------------------------------------------------------


def test_d10_d12_stop_ends_the_agent_with_a_grace_for_tidying(make_spec: SpecMaker) -> None:
    spec = make_spec(sh("trap 'echo tidied > tidy; exit 0' TERM; echo up > sign; while :; do sleep 0.01; done"))

    outcome = stop_when(spec, spec.root / "sign")

    assert outcome._replace(seconds=0) == AgentOutcome(
        "cancelled", detail="stopped before it reported a result"
    )
    assert (spec.root / "tidy").read_text() == "tidied\n"


def test_d12_children_in_the_group_have_the_grace_too(make_spec: SpecMaker) -> None:
    child = "trap 'sleep 0.1; echo tidied > tidy; exit' TERM; echo up > sign; while :; do sleep 0.01; done"
    spec = make_spec(sh(f"sh -c {shlex.quote(child)} & wait"))

    outcome = stop_when(spec, spec.root / "sign")

    assert outcome.kind == "cancelled"
    assert (spec.root / "tidy").read_text() == "tidied\n"


def test_d11_result_written_before_the_stop_is_kept(make_spec: SpecMaker) -> None:
    spec = make_spec(sh(f"{report()}; echo up > sign; sleep {FOREVER}"))

    outcome = stop_when(spec, spec.root / "sign")

    assert outcome.kind == "result"
    assert outcome.detail == "result accepted in spite of: ended by SIGTERM"


def test_d11_result_written_on_term_is_kept(make_spec: SpecMaker) -> None:
    spec = make_spec(sh(f"trap '{report().replace(chr(39), chr(39) + chr(92) + chr(39) + chr(39))}; exit 0' TERM; echo up > sign; while :; do sleep 0.01; done"))

    assert stop_when(spec, spec.root / "sign").kind == "result"


def test_hurry_kills_an_agent_that_ignores_term(make_spec: SpecMaker) -> None:
    spec = make_spec(sh("trap '' TERM; echo $$ > sign; while :; do sleep 0.01; done"))

    outcome = stop_when(spec, spec.root / "sign", hurry=True)

    assert outcome.kind == "cancelled"
    assert not alive(*pids_in(spec.root / "sign"))


def test_grace_ends_in_kill(make_spec: SpecMaker) -> None:
    script = "trap '' TERM; echo $$ > sign; while :; do sleep 0.01; done"
    spec = make_spec(sh(script), grace_s=0.05)

    outcome = stop_when(spec, spec.root / "sign")

    assert outcome.kind == "cancelled"
    assert not alive(*pids_in(spec.root / "sign"))


def test_nothing_starts_after_the_stop(make_spec: SpecMaker) -> None:
    spec = make_spec(sh("echo up > sign"))

    async def main() -> AgentOutcome:
        conductor = Conductor()
        conductor.stop.set()
        return await conductor.attempt(spec)

    assert asyncio.run(main()) == AgentOutcome(
        "cancelled", detail="not started: the run is stopping"
    )
    assert list(spec.root.iterdir()) == []


def test_cancelled_task_leaves_no_process(make_spec: SpecMaker) -> None:
    spec = make_spec(sh(f"trap '' TERM; setsid sleep {FOREVER} & echo $$ $! > sign; sleep {FOREVER}"))

    async def main() -> None:
        running = asyncio.create_task(Conductor().attempt(spec))
        await appears(spec.root / "sign")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert [pid for pid in pids_in(spec.root / "sign") if alive(pid)] == []


def test_exception_in_started_leaves_no_process(make_spec: SpecMaker) -> None:
    pids: list[int] = []

    def fail(pid: int, start: int) -> None:
        pids.append(pid)
        raise LookupError("journal")

    async def main() -> None:
        await run_attempt(
            make_spec(("sleep", str(FOREVER))),
            stop=asyncio.Event(),
            hurry=asyncio.Event(),
            started=fail,
            timing=QUICK,
        )

    with pytest.raises(LookupError):
        asyncio.run(main())
    assert not alive(*pids)


# ---- Survivors -----------------------------------------------------------------------------------

DOUBLE_FORK = (
    "import os,time\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        open('pids', 'a').write(f'{os.getpid()}\\n'); time.sleep(120)\n"
    "    os._exit(0)\n"
    "os.wait()\n"
    "while not os.path.exists('pids'): time.sleep(0.005)\n"
)
SURVIVORS = {
    "background": "sleep 120 & echo $! > pids",
    "nohup": "nohup sleep 120 >&- 2>&- & echo $! > pids",
    "setsid": "setsid sleep 120 & echo $! > pids",
    "ignores-term": "sh -c 'trap \"\" TERM HUP INT; sleep 120' & echo $! > pids",
    "grandchild": "sh -c 'setsid sleep 120 & echo $! > pids'",
    "double-fork": f"{shlex.quote(sys.executable)} -S -E -c {shlex.quote(DOUBLE_FORK)}",
}
CLEANED = {
    "no-environment": "env -i sleep 120 & echo $! > pids",
    "no-environment-setsid": "env -i setsid sh -c 'echo $$ > pids; exec sleep 120' & "
    "while ! [ -s pids ]; do sleep 0.01; done",
    "no-environment-orphan": "sh -c 'env -i setsid sh -c \"echo \\$\\$ > pids; exec sleep 120\" &'; "
    "while ! [ -s pids ]; do sleep 0.01; done",
}


@pytest.mark.parametrize("script", SURVIVORS.values(), ids=SURVIVORS)
def test_d12_nothing_survives_a_normal_exit(make_spec: SpecMaker, script: str) -> None:
    spec = make_spec(sh(f"{script}; {report()}"))

    outcome = attempt(spec)

    left = pids_in(spec.root / "pids")
    assert outcome.kind == "result"
    assert outcome.detail == ""
    assert len(left) == 1
    assert [pid for pid in left if process_entry(pid) is not None] == []


@linux_only
@pytest.mark.parametrize("script", CLEANED.values(), ids=CLEANED)
def test_process_with_a_cleaned_environment_does_not_survive(
    make_spec: SpecMaker, script: str
) -> None:
    spec = make_spec(sh(f"{script}; {report()}"))

    outcome = attempt(spec)

    left = pids_in(spec.root / "pids")
    assert outcome.kind == "result"
    assert [pid for pid in left if process_entry(pid) is not None] == []


def test_nothing_survives_a_stop(make_spec: SpecMaker) -> None:
    script = "sh -c 'trap \"\" TERM; setsid sleep 120 & echo $! >> pids; sleep 120' & sleep 0.02; echo $! >> pids"
    spec = make_spec(sh(f"{script}; cat pids > sign; sleep 120"), grace_s=0.02)

    outcome = stop_when(spec, spec.root / "sign")

    assert outcome.kind == "cancelled"
    assert [pid for pid in pids_in(spec.root / "pids") if alive(pid)] == []


@linux_only
def test_adopted_orphans_are_reaped_while_the_agent_works(make_spec: SpecMaker) -> None:
    """A tool that waits until its daemon is gone must not see our unreaped zombie."""
    daemon = "sh -c 'sleep 0.02 & echo $! > pid'; P=$(cat pid); while kill -0 $P 2>&-; do sleep 0.01; done"
    outcome = attempt(make_spec(sh(f"{daemon}; {report()}"), timeout_s=30))

    assert (outcome.kind, outcome.detail) == ("result", "")


def test_attempts_side_by_side_leave_each_other_alone(make_spec: SpecMaker) -> None:
    slow = "{ setsid sleep 120 & echo $! > a; nohup sleep 120 >&- 2>&- & echo $! >> a; echo up > sign; }"
    first = make_spec(sh(f"{slow}; while ! [ -e go ]; do sleep 0.01; done; kill -0 $(cat a) && {report()}"))
    other = Task("WRK-002", Phase("build"), "main")
    second = make_spec(sh("setsid sleep 120 & echo $! > b; echo done > quick"), task=other)

    async def main() -> tuple[AgentOutcome, list[bool]]:
        conductor = Conductor()
        running = asyncio.create_task(conductor.attempt(first))
        await appears(first.root / "sign")
        await conductor.attempt(second)
        between = [alive(pid) for name in "ab" for pid in pids_in(first.root / name)]
        (first.root / "go").write_text("")
        return await running, between

    outcome, between = asyncio.run(main())
    assert between == [True, True, False]
    assert outcome.kind == "result"
    assert [pid for pid in pids_in(first.root / "a") if alive(pid)] == []


@linux_only
def test_children_of_our_own_are_spared(make_spec: SpecMaker, tmp_path: Path) -> None:
    """Git calls and hooks run beside agents; the sweep after an attempt is not about them."""
    ours = subprocess.Popen(["sleep", "120"], start_new_session=True)
    with ended_after(ours.pid):
        outcome = attempt(make_spec(sh(f"env -i sleep 120 & {report()}")))
        assert outcome.kind == "result"
        assert ours.poll() is None
    ours.wait()


def test_end_run_ends_what_a_killed_run_left(make_spec: SpecMaker) -> None:
    env = agent_environment(make_spec(), os.environ)
    mine = subprocess.Popen(sh("trap '' TERM; echo up; sleep 120"), env=env, stdout=subprocess.PIPE)
    spared = {**os.environ, "ORCHESTRATOR_RUN_ID": "run-10"}
    other = subprocess.Popen(["sleep", "120"], env=spared)
    assert mine.stdout is not None
    with mine.stdout, ended_after(mine.pid, other.pid):
        mine.stdout.readline()
        assert end_run("") == []
        lines = sorted(end_run("run-1", grace_s=0.05))
        assert other.poll() is None
        assert end_run("run-1") == []
    assert len(lines) == 2
    assert f"process {mine.pid} (sh -c trap '' TERM; echo up; sleep 120)" in lines
    assert {mine.wait(), other.wait()} <= {-9, 0}


@linux_only
def test_end_run_gives_time_to_tidy_up(make_spec: SpecMaker, tmp_path: Path) -> None:
    env = agent_environment(make_spec(), os.environ)
    script = f"trap 'sleep 0.05; echo tidied > {tmp_path}/tidy; exit' TERM; echo up; while :; do sleep 0.01; done"
    mine = subprocess.Popen(sh(script), env=env, stdout=subprocess.PIPE)
    assert mine.stdout is not None
    with mine.stdout, ended_after(mine.pid):
        mine.stdout.readline()
        assert end_run("run-1", grace_s=FOREVER)
    assert (tmp_path / "tidy").read_text() == "tidied\n"
    mine.wait()


@pytest.mark.slow
@pytest.mark.parametrize("script", SURVIVORS.values(), ids=SURVIVORS)
@pytest.mark.usefixtures("without_proc")
def test_without_proc_the_process_table_comes_from_ps(make_spec: SpecMaker, script: str) -> None:
    spec = make_spec(sh(f"{script}; {report()}"))

    outcome = attempt(spec)

    assert outcome.kind == "result"
    assert [pid for pid in pids_in(spec.root / "pids") if alive(pid)] == []


@pytest.mark.usefixtures("without_proc")
def test_without_proc_a_stop_works_too(make_spec: SpecMaker) -> None:
    spec = make_spec(sh("env -i setsid sleep 120 & echo $$ $! > sign; sleep 120"))

    assert stop_when(spec, spec.root / "sign").kind == "cancelled"
    assert [pid for pid in pids_in(spec.root / "sign") if alive(pid)] == []


# ---- Watchdogs -----------------------------------------------------------------------------------


def test_time_limit(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(sh("echo busy; sleep 120"), timeout_s=0.1))

    assert (outcome.kind, outcome.trouble) == ("failed", "")
    assert outcome.detail == "timed out after 0.1 seconds\nLast output:\nbusy"


def test_d58_result_written_before_the_time_limit_counts(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(sh(f"{report()}; sleep 120"), timeout_s=0.2), QUICK._replace(settle_s=FOREVER))

    assert outcome.kind == "result"
    assert outcome.detail == "it ran into a time limit after its result"


def test_silent_agent_is_ended(make_spec: SpecMaker) -> None:
    script = "for n in 1 2 3 4 5 6; do echo $n; echo $n >&2; sleep 0.05; done; sleep 120"
    outcome = attempt(make_spec(sh(script), idle_timeout_s=0.2))

    assert (outcome.kind, outcome.trouble) == ("failed", "")
    first, _, tail = outcome.detail.partition("\nLast output:\n")
    assert first == "timed out: no output for 0.2 seconds"
    assert tail.split() == [*"123456", *"123456"]


def test_agent_that_lingers_after_its_result_is_ended(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(sh(f"{report()}; sleep 120")))

    assert outcome.kind == "result"
    assert outcome.detail == "it lingered after its result and was ended"


def test_unfinished_result_does_not_end_the_agent(make_spec: SpecMaker) -> None:
    """A file that cannot be read yet has not settled, however long it stays as it is."""
    script = f'echo "{{" > "$ORCHESTRATOR_RESULT_PATH"; sleep 1; {report()}; exit 7'

    outcome = attempt(make_spec(sh(script)), QUICK._replace(settle_s=0.5))

    assert outcome.kind == "result"
    assert outcome.detail == "result accepted in spite of: exit code 7"


# ---- Output --------------------------------------------------------------------------------------


def test_large_output_is_followed_to_its_end(make_spec: SpecMaker) -> None:
    script = "import sys\nfor n in range(20): sys.stdout.write('x' * 3_000_000 + '\\n')\nprint('the end'); sys.exit(1)"

    outcome = attempt(make_spec(py(script)))

    assert outcome.kind == "failed"
    assert outcome.detail.endswith("…\nthe end")
    assert len(outcome.detail) < 10_000


def test_of_a_flood_the_end_is_read(play: Callable[..., AgentOutcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "BACKLOG_LIMIT", 1000)
    flood = events({"type": "result", "total_cost_usd": 1.0}) + "lost\n" * 1000

    outcome = play("claude", flood + events({"type": "result", "result": "The end"}))

    assert outcome.usage == Usage()  # the first event was not seen
    assert outcome.detail.endswith("\nlost\nThe end")


def test_progress_is_told_when_it_changes(make_spec: SpecMaker) -> None:
    spec = make_spec(sh("echo one; while ! [ -e go ]; do sleep 0.01; done; printf '\\033[1mtwo\\n'"))
    seen: list[Progress] = []

    def note(progress: Progress) -> None:
        seen.append(progress)
        (spec.root / "go").write_text("")

    async def main() -> None:
        events = {"stop": asyncio.Event(), "hurry": asyncio.Event()}
        await run_attempt(spec, **events, started=lambda *_: None, progress=note, timing=QUICK)

    asyncio.run(main())
    assert seen == [Progress("one"), Progress("two")]


# ---- Agent CLIs, as recorded event streams -------------------------------------------------------


@pytest.fixture
def play(make_spec: SpecMaker, tmp_path: Path) -> Callable[..., AgentOutcome]:
    """Run an attempt whose CLI is a script on PATH that prints the given stream and exits."""

    def run(cli: str, stream: str, code: int = 0, *, result: bool = False) -> AgentOutcome:
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir(exist_ok=True)
        (tmp_path / "stream").write_text(stream)
        binary = bin_dir / cli
        write = report() if result else ":"
        binary.write_text(f"#!/bin/sh\ncat '{tmp_path}/stream'\n{write}\nexit {code}\n")
        binary.chmod(0o755)
        path = f"{bin_dir}:{os.environ['PATH']}"
        return attempt(make_spec(settings=AgentSettings(cli=cli, env={"PATH": path})))

    return run


def recorded(name: str) -> str:
    return (DATA / f"{name}.jsonl").read_text()


def events(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_claude_good_end(play: Callable[..., AgentOutcome]) -> None:
    outcome = play("claude", recorded("claude-ok"), result=True)

    assert outcome.kind == "result"
    assert outcome.usage == Usage(pytest.approx(0.018), 3000, 600)


def test_claude_good_end_without_a_result_fails(play: Callable[..., AgentOutcome]) -> None:
    outcome = play("claude", recorded("claude-ok"))

    assert outcome.kind == "failed"
    assert outcome.detail == (
        "no result file was written (exit code 0)\nLast output:\n"
        "Bash: echo work > work.txt\n"
        "Write: /tmp/project/claude-ok/.orchestrator/results/WRK-001_build_tok.json\n"
        "Finished.\nFinished."
    )


LIMIT = 1_800_000_000.0  # 2027-01-15T08:00:00Z, in the recording


@pytest.mark.parametrize(
    ("cli", "stream", "kind", "until", "error"),
    [
        ("claude", "claude-limit", "limited", LIMIT, "claude: usage limit reached (five_hour); resets at 2027-01-15 08:00 UTC"),
        ("claude", "claude-429", "busy", None, "claude: API Error: Request rejected (429) · slow down"),
        ("claude", "claude-529", "busy", None, "claude: API Error: 529 "),
        ("claude", "claude-offline", "busy", None, "claude: API Error: Unable to connect to API."),
        ("claude", "claude-killed", "busy", None, "claude gave no reason (exit code 1); its output is in .orchestrator/logs/WRK-001/build-1.out"),
        ("claude", "claude-budget", "", None, ""),
        ("claude", "claude-nologin", "refused", None, "claude: Not logged in · Please run /login"),
        ("claude", "claude-401", "refused", None, "claude: Failed to authenticate. API Error: 401 "),
        ("codex", "codex-limit", "limited", None, "codex: You’ve hit your usage limit."),
        ("codex", "codex-429", "busy", None, "codex: exceeded retry limit, last status: 429 Too Many Requests"),
        ("codex", "codex-401", "refused", None, "codex: unexpected status 401 Unauthorized: bad key"),
        ("opencode", "opencode-401", "refused", None, "opencode: APIError: bad key"),
        ("opencode", "opencode-429", "busy", None, "opencode: APIError: slow down"),
        ("opencode", "opencode-offline", "busy", None, "opencode: APIError: Cannot connect to API"),
        ("gemini", "gemini-limit", "limited", None, "gemini: [API Error: You have exhausted your daily quota on this model.]"),
        ("gemini", "gemini-offline", "busy", None, "gemini: [API Error: exception TypeError: fetch failed"),
        ("gemini", "gemini-killed", "", None, ""),
    ],
    ids=lambda value: value if isinstance(value, str) and "-" in value[:9] else "",
)  # fmt: skip
def test_d50_limits_and_logins_are_told_apart_from_failures(
    play: Callable[..., AgentOutcome], cli: str, stream: str, kind: str, until: float | None, error: str
) -> None:
    outcome = play(cli, recorded(stream), 1)

    assert (outcome.trouble or outcome.kind.removeprefix("failed"), outcome.until) == (kind, until)
    assert outcome.error.startswith(error)
    assert bool(outcome.error) == bool(error)


def test_result_beats_a_usage_limit(play: Callable[..., AgentOutcome]) -> None:
    assert play("claude", recorded("claude-limit"), 1, result=True).kind == "result"


def test_prose_about_limits_is_no_limit(play: Callable[..., AgentOutcome]) -> None:
    words = "Error 429: you hit your usage limit, quota exceeded. Not logged in. 401 Unauthorized"
    said = {"type": "assistant", "message": {"id": "m", "content": [{"type": "text", "text": words}]}}
    done = {"type": "result", "subtype": "success", "is_error": False, "result": words}
    warning = {"type": "rate_limit_event", "rate_limit_info": {"status": "allowed_warning", "resetsAt": 1}}
    item = {"type": "item.completed", "item": {"type": "agent_message", "text": words}}
    echo = {"type": "message", "role": "user", "content": words}

    kinds = [
        play("claude", events(said, warning, done)).kind,
        play("codex", events(item, {"type": "turn.completed", "usage": {}})).kind,
        play("gemini", events(echo, {"type": "result", "status": "success"})).kind,
        play("opencode", events({"type": "text", "part": {"text": words}})).kind,
    ]

    assert kinds == ["failed"] * 4


def test_claude_that_recovers_from_a_limit_is_not_limited(play: Callable[..., AgentOutcome]) -> None:
    limit = recorded("claude-limit").splitlines(keepends=True)
    rejected = [line for line in limit if '"rejected"' in line]
    assert rejected

    assert play("claude", "".join(rejected) + recorded("claude-ok")).kind == "failed"


def test_claude_with_two_closing_events(play: Callable[..., AgentOutcome]) -> None:
    """Cost is cumulative over them, tokens are not."""
    first = {"type": "result", "is_error": True, "total_cost_usd": 0.5, "usage": {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 1}}
    last = {"type": "result", "is_error": False, "total_cost_usd": 0.75, "usage": {"input_tokens": 20, "output_tokens": 2}}

    outcome = play("claude", events(first, last), result=True)

    assert outcome.usage == Usage(0.75, 35, 3)
    recording = play("claude", recorded("claude-two"), result=True)
    assert recording.usage == Usage(pytest.approx(0.018), 3000, 600)


def test_claude_stream_that_breaks_off(play: Callable[..., AgentOutcome]) -> None:
    stream = recorded("claude-ok")
    outcome = play("claude", stream[: stream.rindex('{"type":"result"') + 40], 143)

    assert outcome.kind == "failed"
    assert outcome.detail.startswith(
        "no result file was written (exit code 143); its event stream breaks off without a closing event\n"
    )
    assert outcome.usage == Usage(None, 3000, 3)


def test_claude_permission_denials_are_named(play: Callable[..., AgentOutcome]) -> None:
    denials = [{"tool_name": "Write", "tool_input": {}}, {"tool_name": "Bash"}, {"tool_name": "Write"}]
    done = {"type": "result", "is_error": False, "result": "Sorry", "permission_denials": denials}

    outcome = play("claude", events(done))

    assert outcome.detail == (
        "no result file was written (exit code 0); it was not permitted to use: Bash, Write\n"
        "Last output:\nSorry"
    )


def test_claude_error_end_is_reported(play: Callable[..., AgentOutcome]) -> None:
    outcome = play("claude", events({"type": "result", "subtype": "error_max_turns", "is_error": True}), 1)

    assert outcome.kind == "failed"
    assert outcome.detail.startswith(
        "no result file was written (exit code 1); it reports: error_max_turns"
    )


@pytest.mark.parametrize("cli", ["claude", "codex", "opencode", "gemini"])
def test_odd_events_are_survived(play: Callable[..., AgentOutcome], cli: str) -> None:
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

    assert outcome.kind == "failed"
    assert outcome.usage == Usage()
    assert len(outcome.detail) < 12_000


def test_codex_good_end(play: Callable[..., AgentOutcome]) -> None:
    outcome = play("codex", recorded("codex-ok"), result=True)

    assert (outcome.kind, outcome.usage) == ("result", Usage(None, 3000, 600))


def test_gemini_good_end(play: Callable[..., AgentOutcome]) -> None:
    outcome = play("gemini", recorded("gemini-ok"), result=True)

    assert (outcome.kind, outcome.usage) == ("result", Usage(None, 3000, 600))


def test_opencode_sums_its_steps(play: Callable[..., AgentOutcome]) -> None:
    tokens = {"input": 100, "output": 10, "cache": {"read": 5, "write": 2}}
    step = {"type": "step_finish", "part": {"tokens": tokens, "cost": 0.25}}

    assert play("opencode", events(step, step), result=True).usage == Usage(0.5, 214, 20)
    whole = play("opencode", recorded("opencode-ok"), result=True)
    assert whole.usage == Usage(pytest.approx(0.018), 3000, 600)


def claude_end(text: str = "", **more: object) -> dict[str, object]:
    return {"type": "result", "subtype": "success", "is_error": True, "result": text, **more}


def codex_end(text: str) -> list[dict[str, object]]:
    return [{"type": "turn.started"}, {"type": "error", "message": text}, {"type": "turn.failed", "error": {"message": text}}]


def opencode_end(text: str, name: str = "APIError", status: int | None = None) -> dict[str, object]:
    return {"type": "error", "error": {"name": name, "data": {"message": text, "statusCode": status}}}


def gemini_end(text: str) -> dict[str, object]:
    return {"type": "result", "status": "error", "error": {"message": text}}


SPOKE = {"type": "assistant", "error": "billing_error", "message": {"content": [{"type": "text", "text": "Credit balance is too low"}]}}
CAPACITY = "Selected model is at capacity. Please try a different model."
OVER_RATE = "Rate limit reached for gpt-5 in organization org-1 on tokens per min (TPM): Limit 30000. Add a payment method at …"
POLICY = "API Error: Claude Code is unable to respond to this request, which appears to violate our Usage Policy"
ENDS = [
    ("claude", [SPOKE], 1, "refused"),
    ("claude", [claude_end("There's an issue with the selected model (x). It may not exist", api_error_status=404)], 1, "refused"),
    ("claude", [claude_end("This organization has been disabled.", api_error_status=400)], 1, "refused"),
    ("claude", [claude_end("Prompt is too long", api_error_status=400)], 1, "item"),
    ("claude", [claude_end("Request too large (max 32MB).", api_error_status=413)], 1, "item"),
    ("claude", [claude_end(POLICY, api_error_status=400)], 1, "item"),
    ("claude", [claude_end("Context limit reached · /compact or /clear to continue")], 1, "item"),
    ("claude", [claude_end("Request exceeded the token limit")], 0, "busy"),
    ("claude", [claude_end("This file is over the token usage limit")], 0, "busy"),
    ("claude", [claude_end("Words that nobody has seen yet")], 0, "busy"),
    ("codex", codex_end(CAPACITY), 0, "busy"),
    ("codex", codex_end(OVER_RATE), 1, "busy"),
    ("codex", codex_end("Codex ran out of room in the model's context window. Start a new thread."), 1, "item"),
    ("codex", codex_end("The 'x' model is not supported when using Codex with a ChatGPT account."), 1, "refused"),
    ("opencode", [opencode_end("quota exceeded", status=429)], 1, "limited"),
    ("opencode", [opencode_end("m", "ProviderAuthError")], 1, "refused"),
    ("opencode", [opencode_end("m", status=500)], 1, "busy"),
    ("opencode", [opencode_end("m", status=400)], 1, "busy"),
    ("gemini", [gemini_end("The input token count (1200000) exceeds the maximum number of tokens allowed")], 144, "item"),
    ("gemini", [gemini_end("fetch failed")], 1, "busy"),
    ("gemini", [{"type": "init"}], 173, "busy"),
    ("gemini", [{"type": "init"}], 41, "refused"),
    ("gemini", [{"type": "init"}], 55, "refused"),
]  # fmt: skip


@pytest.mark.parametrize(("cli", "rows", "code", "kind"), ENDS, ids=[f"{row[0]}-{row[3]}" for row in ENDS])
def test_what_an_early_error_is_about(
    play: Callable[..., AgentOutcome], cli: str, rows: list[object], code: int, kind: str
) -> None:
    outcome = play(cli, events(*rows), code)

    assert (outcome.trouble or outcome.kind) == kind
    assert outcome.error.startswith(cli)


@pytest.mark.parametrize(
    ("cli", "rows", "expected"),
    [
        ("claude", [claude_end("You've hit your session limit · resets 4:10am (America/Sao_Paulo)", api_error_status=429)], "2026-11-22T07:10+00:00"),
        ("claude", [claude_end("Session limit reached ∙ resets 10am")], "2026-11-22T18:00+00:00"),  # Los Angeles
        ("claude", [claude_end("You've hit your limit · resets 11:30pm (Europe/Berlin)")], "2026-11-21T22:30+00:00"),
        ("codex", codex_end("You've hit your usage limit. Try again in 3 days 4 hours 12 minutes."), "2026-11-25T00:12+00:00"),
    ],
    ids=["named zone", "local zone", "another zone", "span"],
)  # fmt: skip
def test_a_usage_limit_told_in_words_has_its_reset(
    play: Callable[..., AgentOutcome], monkeypatch: pytest.MonkeyPatch, cli: str, rows: list[object], expected: str
) -> None:
    """Without the event that usually comes with it, and even if the CLI exits with 0."""
    now = datetime(2026, 11, 21, 20, 0, tzinfo=UTC).timestamp()
    monkeypatch.setattr(orchestrator.time, "time", lambda: now)

    with local_zone(monkeypatch, "America/Los_Angeles"):
        outcome = play(cli, events(*rows))
        shown = datetime.fromtimestamp(outcome.until or 0).astimezone()

    assert outcome.kind == "limited"
    assert datetime.fromtimestamp(outcome.until or 0, UTC).isoformat(timespec="minutes") == expected
    assert outcome.error == f"{cli}: {rows[-1].get('result') or rows[-1]['error']['message']}; resets at {shown:%Y-%m-%d %H:%M %Z}"  # type: ignore[attr-defined]


@contextlib.contextmanager
def local_zone(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", name)
        time.tzset()
        yield
    time.tzset()


def test_a_usage_limit_after_work_is_one_all_the_same(play: Callable[..., AgentOutcome]) -> None:
    tool = {"type": "assistant", "message": {"content": [{"type": "tool_use", "name": "Bash"}]}}

    outcome = play("claude", events(tool, claude_end("5-hour limit reached ∙ resets 3pm")), 1)

    assert outcome.kind == "limited"


def test_an_error_after_work_is_a_failed_attempt_that_tells_it(play: Callable[..., AgentOutcome]) -> None:
    tool = {"type": "assistant", "message": {"content": [{"type": "tool_use", "name": "Bash", "input": {"command": "make"}}]}}

    outcome = play("claude", events(tool, claude_end("API Error: 500 Internal server error", api_error_status=500)), 1)

    assert (outcome.kind, outcome.trouble, outcome.error) == ("failed", "", "")
    assert outcome.detail.startswith(
        "no result file was written (exit code 1); it reports: API Error: 500 Internal server error\n"
    )


def test_an_error_without_a_word_names_the_log(play: Callable[..., AgentOutcome]) -> None:
    outcome = play("claude", events(claude_end("", num_turns=0)))

    assert outcome.trouble == "busy"
    assert outcome.error == "claude gave no reason (exit code 0); its output is in .orchestrator/logs/WRK-001/build-1.out"
    assert "it failed and gave no reason, its output is in .orchestrator/logs" in outcome.detail


@pytest.mark.parametrize("cli", ["claude", "codex", "opencode", "gemini", "mine"])
def test_a_cli_that_exits_at_once_says_why_on_standard_error(
    make_spec: SpecMaker, tmp_path: Path, cli: str
) -> None:
    """Usage limits are read from events alone: on standard error anybody may speak of one."""
    binary = tmp_path / cli
    settings = AgentSettings(cli=cli, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    if cli == "mine":
        settings = AgentSettings(cli="command", command=(str(binary),))
    told = {}
    for words in ("error: unknown option --foo\nsee --help", "usage limit reached", "Traceback", ""):
        binary.write_text(f"#!/bin/sh\nprintf '%s\\n' '{words}' >&2\nexit 3\n")
        binary.chmod(0o755)
        outcome = attempt(make_spec(settings=settings))
        assert outcome.kind == "failed"
        told[words[:5]] = (outcome.trouble, outcome.error)

    silent = f"{cli} gave no reason (exit code 3); its output is in .orchestrator/logs/WRK-001/build-1"
    assert told["error"] == ("refused", f"{cli}: error: unknown option --foo")
    assert told["Trace"] == ("busy", f"{cli}: Traceback")
    assert told["usage"] == ("busy", f"{silent}.2.out")
    assert told[""] == ("busy", f"{silent}.4.out")


def test_a_command_that_worked_a_while_has_failed_at_its_work(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrator, "EARLY_S", 0.0)

    assert attempt(make_spec(sh("echo unknown option >&2; exit 3"))).trouble == ""


def test_codex_that_reconnects_has_no_trouble(play: Callable[..., AgentOutcome]) -> None:
    again = {"type": "error", "message": "Reconnecting... 1/5 (stream disconnected)"}
    done = {"type": "turn.completed", "usage": {"input_tokens": 1}}

    outcome = play("codex", events({"type": "turn.started"}, again, done))

    assert (outcome.trouble, outcome.error) == ("", "")
    assert outcome.detail.startswith("no result file was written (exit code 0)\n")


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


FENCED = f"All done {{really}}.\n\n```json\n{json.dumps(json.loads(report_json()), indent=2)}\n```\nBye."


@pytest.mark.parametrize("cli", ["claude", "codex", "opencode", "gemini"])
def test_the_result_in_a_closing_message_is_taken_with_a_warning(play: Callable[..., AgentOutcome], cli: str) -> None:
    for text in (FENCED, report_json()):
        outcome = play(cli, events(*closing(cli, text)))

        assert outcome.result is not None
        assert (outcome.result.result, outcome.result.summary) == ("phase_complete", "Did it")
        assert outcome.result.warnings == ("no result file was written; its closing message held the result",)


def test_only_one_right_result_of_a_good_end_is_taken(play: Callable[..., AgentOutcome]) -> None:
    wrong = report_json(item_id="WRK-2")
    odd = report_json("finished")
    cut = "{\"item_id\": \"WRK-001\", " * 3000
    for text in (FENCED + FENCED, wrong, odd, "[]", '{"item_id": "WRK-001"}', "{" * 50_000, cut):
        assert play("claude", events(*closing("claude", text))).kind == "failed"
    assert play("claude", events(*closing("claude", wrong + FENCED))).kind == "result"
    assert play("claude", events(*closing("claude", FENCED)), 1).kind == "failed"
    assert play("claude", events(claude_end(FENCED))).kind == "failed"
    assert play("codex", events({"type": "turn.started"}, *closing("codex", FENCED)[:1])).kind == "failed"


CLAUDE_TASK = {"type": "user", "tool_use_result": {"stdout": "", "backgroundTaskId": "b1"}}
CLAUDE_NAMED = {"type": "system", "subtype": "task_started", "task_id": "b1", "description": "run the tests"}
CODEX_TASK = {"type": "item.started", "item": {"id": "item_1", "type": "command_execution", "command": "run the tests"}}


@pytest.mark.parametrize(
    ("cli", "rows"),
    [
        ("claude", [CLAUDE_TASK, CLAUDE_NAMED]),
        ("claude", [CLAUDE_NAMED, {**CLAUDE_TASK, "tool_use_result": {"status": "async_launched", "agentId": "b1"}}]),
        ("codex", [CODEX_TASK]),
    ],
    ids=["claude command", "claude agent", "codex"],
)  # fmt: skip
def test_work_that_still_runs_in_the_background_is_not_done(
    play: Callable[..., AgentOutcome], cli: str, rows: list[object]
) -> None:
    outcome = play(cli, events(*rows, *closing(cli, "Waiting.")), result=True)

    assert (outcome.kind, outcome.trouble, outcome.result) == ("failed", "", None)
    assert outcome.detail.startswith("it ended while this was still running in the background: run the tests (exit code 0)\n")


def test_background_work_of_a_recorded_claude(play: Callable[..., AgentOutcome]) -> None:
    """It says so, waits, and takes another turn; here it is cut off after the first."""
    whole = recorded("claude-two").splitlines(keepends=True)
    first = next(number for number, line in enumerate(whole) if '"type":"result"' in line)

    outcome = play("claude", "".join(whole[: first + 1]), result=True)

    assert outcome.detail.startswith("it ended while this was still running in the background: do it (exit code 0)\n")
    assert play("claude", "".join(whole), result=True).kind == "result"


def test_background_work_that_was_waited_for_is_done(play: Callable[..., AgentOutcome]) -> None:
    told = {"type": "system", "subtype": "task_updated", "task_id": "b1", "patch": {"status": "running"}}
    over = {"type": "system", "subtype": "task_notification", "task_id": "b1", "status": "completed"}
    done = {"type": "item.completed", "item": {**CODEX_TASK["item"], "exit_code": 0}}  # type: ignore[dict-item]

    assert play("claude", events(CLAUDE_TASK, told, over, *closing("claude", ".")), result=True).kind == "result"
    assert play("codex", events(CODEX_TASK, done, *closing("codex", ".")), result=True).kind == "result"


def test_claude_is_told_to_wait_for_its_commands(make_spec: SpecMaker) -> None:
    env = agent_environment(make_spec(settings=AgentSettings(cli="claude")), {})

    assert env["CLAUDE_CODE_DISABLE_BACKGROUND_TASKS"] == "1"


# ---- When a limit ends ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("You’ve hit your usage limit, try again at 5:13 PM.", "2026-11-22T17:13"),
        ("try again at 11:59 AM", "2026-11-22T11:59"),  # just passed: not tomorrow's
        ("try again at 12:05 AM", "2026-11-23T00:05"),
        ("try again at Nov 25th, 2026 2:10 AM.", "2026-11-25T02:10"),
        ("try again at Apr 28th, 2026 10:03 PM", "2026-04-28T22:03"),
        ("resets 4:10am (America/Sao_Paulo)", "2026-11-23T09:10"),
        ("resets 1pm", "2026-11-22T13:00"),
        ("resets Dec 6, 1pm (Europe/Berlin)", "2026-12-06T14:00"),
        ("resets Jan 2, 1pm", "2027-01-02T13:00"),
        ("resets Jan 15, 2027, 8am (UTC)", "2027-01-15T10:00"),
        ("resets at 23:30 UTC", "2026-11-23T01:30"),
        ("resets 11pm (UTC-3)", "2026-11-23T04:00"),
        ("resets 15:00 +05:30", "2026-11-22T11:30"),
        ("Your limit will reset at 3pm (America/New_York).", "2026-11-22T22:00"),
        ("You will regain access on 2026-12-01 at 00:00 UTC.", "2026-12-01T02:00"),
        ("Claude AI usage limit reached|1795345200", "2026-11-22T13:00"),
        ("Try again in 3 days 4 hours 12 minutes.", "2026-11-25T16:12"),
        ("Your quota will reset after 17h43m51s.", "2026-11-23T05:44"),
        ("Please retry in 90.5s", "2026-11-22T12:02"),
        ("resets 4:10am (Nowhere/Atlantis)", None),
        ("resets 10", None),
        ("try again at 25:99 PM", None),
        ("try again at Foo 25th, 2026 2:10 AM.", None),
        ("try again later", None),
    ],
)
def test_reset_told_in_words(monkeypatch: pytest.MonkeyPatch, text: str, expected: str | None) -> None:
    with local_zone(monkeypatch, "Africa/Johannesburg"):  # two hours ahead, all year
        found = reset_time(text, datetime(2026, 11, 22, 12, 0, 30).timestamp())

        assert (found and datetime.fromtimestamp(found).isoformat()[:16]) == expected


def test_reset_after_midnight_is_tomorrows() -> None:
    now = datetime(2026, 11, 22, 23, 50, tzinfo=UTC).timestamp()
    assert reset_time("try again at 2:10 AM (UTC)", now) == datetime(2026, 11, 23, 2, 10, tzinfo=UTC).timestamp()


def test_reset_beyond_a_change_of_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_zone(monkeypatch, "Europe/Berlin"):
        found = reset_time("resets Oct 26, 9am", datetime(2026, 10, 20, 12).timestamp())

    assert found == datetime(2026, 10, 26, 8, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("cli", "words"),
    [
        ("claude", "claude -p --output-format stream-json --verbose --dangerously-skip-permissions --model M X"),
        ("codex", "codex exec --json --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox -m M X -"),
        ("opencode", "opencode run --format json --auto --title WRK-001:build -m M X"),
        ("gemini", "gemini --yolo --output-format stream-json -m M X"),
    ],
)  # fmt: skip
def test_command_lines(make_spec: SpecMaker, cli: str, words: str) -> None:
    settings = AgentSettings(cli=cli, model="M", args=("X",))
    bare = AgentSettings(cli=cli)

    def argv(settings: AgentSettings) -> list[str]:
        spec = make_spec(settings=settings)
        return agent_argv(spec)

    assert argv(settings) == shlex.split(words)
    assert argv(bare) == shlex.split(words.replace("--model M", "").replace("-m M", "").replace("X", ""))


# ---- Can the agent work here? --------------------------------------------------------------------


def test_agent_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("claude", "mine", "data.txt"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o644 if name == "data.txt" else 0o755)
    path = {"PATH": str(tmp_path)}

    def what(outer: dict[str, str] = path, **settings: object) -> str | None:
        problem = agent_problem(AgentSettings(**settings), tmp_path, outer)  # type: ignore[arg-type]
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
    assert what({**path, "IS_SANDBOX": "yes"}, cli="claude") == "claude refuses to work unattended as root"
    assert what(cli="claude", env={"IS_SANDBOX": "1"}) is None
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert what(cli="claude") is None


# ---- Phases that are a command, and verify commands ----------------------------------------------


def run_phase(*argv: str) -> Task:
    return Task("WRK-001", Phase("check", run=argv), "main")


def test_run_phase_completes_by_exit_code(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(("no-such-agent",), task=run_phase(*sh("cat; echo fine"))))

    assert outcome.kind == "result"
    assert outcome.result is not None
    assert outcome.result._asdict() == {
        **outcome.result._asdict(),
        "item_id": "WRK-001",
        "phase": "check",
        "result": "phase_complete",
        "summary": "`sh -c 'cat; echo fine'` succeeded",
    }


def test_run_phase_fails_with_its_tail(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(task=run_phase(*sh("echo broken >&2; exit 9"))))

    assert outcome.kind == "failed"
    assert outcome.detail == "sh -c echo broken >&2; exit 9: exit code 9\nLast output:\nbroken"


def test_run_phase_that_is_missing_fails_without_blaming_the_agent(make_spec: SpecMaker) -> None:
    outcome = attempt(make_spec(task=run_phase("no-such-command")))

    assert outcome.kind == "failed"
    assert outcome.detail == "'no-such-command' cannot be started: No such file or directory"


def test_run_phase_stopped_is_cancelled(make_spec: SpecMaker) -> None:
    script = "trap 'exit 0' TERM; echo up > sign; while :; do sleep 0.01; done"
    spec = make_spec(task=run_phase(*sh(script)))

    assert stop_when(spec, spec.root / "sign").kind == "cancelled"


def verify(spec: AttemptSpec, *commands: Sequence[str], stop: Path | None = None) -> str | None:
    async def main() -> str | None:
        signs = {"stop": asyncio.Event(), "hurry": asyncio.Event()}
        running = asyncio.create_task(run_verify(spec, commands, **signs, timing=QUICK))
        if stop is not None:
            await appears(stop)
            signs["stop"].set()
        return await running

    return asyncio.run(main())


def test_verify_passes_in_order(make_spec: SpecMaker) -> None:
    spec = make_spec()
    assert verify(spec, sh("echo 1 >> seen"), sh("echo 2 >> seen; test -n \"$ORCHESTRATOR_ITEM_ID\"")) is None
    assert (spec.root / "seen").read_text() == "1\n2\n"


def test_verify_tells_the_first_failure(make_spec: SpecMaker) -> None:
    spec = make_spec()
    text = verify(spec, ("true",), sh("echo 3 failed; setsid sleep 120 & echo $! > pids; exit 2"), sh("touch not-reached"))

    assert text is not None
    assert text.startswith("verify command `sh -c echo 3 failed; setsid")
    assert text.endswith("` failed with exit code 2\nLast output:\n3 failed")
    assert not (spec.root / "not-reached").exists()
    assert [pid for pid in pids_in(spec.root / "pids") if alive(pid)] == []


def test_verify_troubles_are_told(make_spec: SpecMaker) -> None:
    spec = make_spec()
    assert verify(spec, ("no-such",)) == "verify command `no-such` cannot be started: No such file or directory"
    assert verify(spec._replace(timeout_s=0.05), ("sleep", "120")) == "verify command `sleep 120` ran out of time"
    stopped = verify(spec, sh("echo up > sign; sleep 120"), stop=spec.root / "sign")
    assert stopped == "verify command `sh -c echo up > sign; sleep 120` was stopped"


# ---- The demo agent ------------------------------------------------------------------------------


def demo(spec: AttemptSpec, phase: str, title: str, attempt: int = 1) -> dict[str, object]:
    spec = spec._replace(task=Task("WRK-001", Phase(phase), "main"), attempt=attempt)
    target = result_path(spec.root, "WRK-001", phase, spec.token)
    target.parent.mkdir(parents=True, exist_ok=True)
    prompt = f"# Autonomous Agent\n\n## Item\n\n- **ID:** WRK-001\n- **Title:** {title}\n"
    assert demo_agent(agent_environment(spec, {}), prompt, spec.root) == 0
    result = orchestrator.parse_result(target.read_bytes(), "WRK-001", phase)
    assert result.warnings == ()
    return {key: value for key, value in result._asdict().items() if value}


def test_demo_agent_by_phase_and_title(make_spec: SpecMaker) -> None:
    spec = make_spec()
    changes = spec.change_dir

    rated = demo(spec, "triage", "A risky change")
    assert rated["result"] == "phase_complete"
    assert rated["ratings"] == {"size": "small", "complexity": "low", "risk": "high", "impact": "medium"}
    assert demo(spec, "triage", "Plain")["ratings"] == {**rated["ratings"], "risk": "low"}  # type: ignore[dict-item]
    assert demo(spec, "prd", "Plain")["summary"] == "Wrote PRD.md"
    assert (changes / "PRD.md").read_text() == "# Plain: prd\n\nWritten by the demo agent.\n"
    assert demo(spec, "prd", "Something unclear")["result"] == "blocked"
    assert demo(spec, "build", "A flaky thing")["result"] == "failed"
    assert demo(spec, "build", "A flaky thing", attempt=2)["commit_summary"] == "Add demo/a_flaky_thing.py"
    assert (spec.root / "demo/a_flaky_thing.py").read_text().startswith("# A flaky thing\n")
    assert "follow_ups" not in demo(spec, "build", "Plain")
    assert len(demo(spec, "build", "Has a follow-up")["follow_ups"]) == 1  # type: ignore[arg-type]
