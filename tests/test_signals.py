"""Signals: the run ends in order, whatever it is doing; nobody survives it; nothing is blocked for it."""

import os
import re
import signal
import sys
from typing import Any

import pytest

from tests.gitkit import is_alive, table

HANG = {"announce": True, "hang": True}
HALT = "[orchestrator] Save backlog state on halt (ShutdownRequested)"

# A tool command of an agent in a session of its own, deaf to TERM, its environment kept.
DEAF_CHILD = (
    "setsid sh -c 'trap \"\" TERM INT HUP; echo $$ > {0}/child.pid; : > {0}/ready; exec sleep 1000' &"
    " cat {0}/ready > /dev/null"
)


def prepare(project: Any, *items: str, phases: str = "plan build!", execution: str = "", script: Any = None, **settings: float) -> None:
    project.configure(phases, execution=execution)
    config = project.root / "orchestrator.toml"
    for name, value in settings.items():
        config.write_text(re.sub(f"{name} = .*", f"{name} = {value}", config.read_text()))
    project.set_up(*items, script=script or {"*": [HANG]})


def ended_well(project: Any, statuses: dict[str, str]) -> None:
    assert project.statuses() == statuses
    assert project.committed() == project.text()
    assert project.status() == ""
    assert project.survivors() == []
    assert not list((project.root / ".git").glob("*.lock"))


@pytest.mark.slow
def test_twice_ends_deaf_agents_and_their_children_without_the_grace(project: Any) -> None:
    """With a grace of an hour only the second signal can end this; it does not skip the commit."""
    deaf = {"on_term": "ignore", "sh": DEAF_CHILD.format(project.outside), **HANG}
    prepare(project, "WRK-001 ready", script={"*": [deaf]}, kill_grace_seconds=3600)
    os.mkfifo(project.outside / "ready")
    process = project.start("run")
    project.announced()
    child = project.outside / "child.pid"
    assert is_alive(child)
    os.killpg(process.pid, signal.SIGINT)
    log = project.read_until(process, "once more")
    os.killpg(process.pid, signal.SIGTERM)
    log += project.finish(process, 130)
    assert "ending the agents at once" in log
    assert not is_alive(child)
    assert project.subjects()[:2] == [HALT, "Set up"]
    ended_well(project, {"WRK-001": "in_progress plan"})


def test_d11_d12_d58_results_that_are_finished_meanwhile_count(project: Any) -> None:
    """One agent uses the grace after TERM to write its result, the other does not."""
    prepare(project, "WRK-001 ready", "WRK-002 ready", phases="plan build!", execution="max_wip = 2\nmax_concurrent = 2", script={
        "WRK-001/plan": [{**HANG, "on_term": "finish", "document": "plan.md"}],
        "WRK-002/plan": [{**HANG, "document": "half.md"}],
    })
    process = project.start("run")
    assert {project.announced(), project.announced()} == {"WRK-001 plan 1", "WRK-002 plan 1"}
    process.terminate()
    project.finish(process, 143)
    ended_well(project, {"WRK-001": "in_progress build", "WRK-002": "in_progress plan"})
    committed = {path for n in range(len(project.subjects()) - 2) for path in project.paths(f"HEAD~{n}")}
    assert {"changes/WRK-001_item-wrk-001/plan.md", "changes/WRK-002_item-wrk-002/half.md"} <= committed


@pytest.mark.slow
def test_during_verify_and_a_command_phase(project: Any) -> None:
    """A check that hangs is ended like an agent; what it was to check is checked by the next start."""
    hang = f"echo here > {project.outside}/announce; exec sleep 1000"
    check = f'verify = [["sh", "-c", "test -e {project.outside}/fine || {{ {hang}; }}"]]\n'
    ship = f"test -e {project.outside}/fine || {{ {hang}; }}; ls > $ORCHESTRATOR_CHANGE_DIR/files.txt"
    project.configure("plan", more=f'{check}[[pipelines.feature.phases]]\nname = "ship"\nrun = ["sh", "-c", "{ship}"]\n')
    project.set_up("WRK-001 ready", "WRK-002 in_progress phase=ship phase_pool=main")
    for target, statuses in (("WRK-002", ("ready", "in_progress ship")), ("WRK-001", ("in_progress plan", "in_progress ship"))):
        process = project.start("run", "--target", target)
        assert project.announced() == "here"
        process.send_signal(signal.SIGTERM)
        project.finish(process, 143)
        ended_well(project, dict(zip(("WRK-001", "WRK-002"), statuses, strict=True)))
    (project.outside / "fine").touch()
    project.run("run", "--target", "WRK-001", "--cap", "0")
    assert project.agent_log() == ["WRK-001 plan 1"]
    assert project.statuses()["WRK-001"] == "in_progress ship"
    project.run("run", "--target", "WRK-002")
    assert "orchestrator.toml\n" in project.git("show", "HEAD:changes/WRK-002_item-wrk-002/files.txt")
    assert project.status() == ""


def test_others_are_decided_while_a_check_runs(project: Any) -> None:
    check = f'verify = [["sh", "-c", "echo here > {project.outside}/announce; cat {project.outside}/go"]]\n'
    project.configure("again! plan", more=check, execution="max_concurrent = 2\nmax_wip = 2")
    project.set_up("WRK-001 in_progress phase=plan phase_pool=main", "WRK-002 new", script={"*/triage": [{"sh": f"cat {project.outside}/start"}]})
    os.mkfifo(project.outside / "go")
    os.mkfifo(project.outside / "start")
    process = project.start("run", "--cap", "2")
    assert project.announced() == "here"
    (project.outside / "start").write_text("now\n")
    log = project.read_until(process, "committed")
    assert "[WRK-002][triage]" in log.splitlines()[-1]
    (project.outside / "go").write_text("now\n")
    assert "WRK-001 is done" in project.finish(process, 0)


@pytest.mark.slow
def test_twice_ends_a_hook_and_the_next_start_has_it_run_again(project: Any) -> None:
    prepare(project, "WRK-001 ready", phases="build!", script={"*": [{"sh": "echo x > code.txt"}]})
    project.hook("pre-commit", f"test -e {project.outside}/fine || {{ echo here > {project.outside}/announce; exec sleep 1000; }}")
    process = project.start("run")
    assert project.announced() == "here"
    process.send_signal(signal.SIGINT)
    log = project.read_until(process, "once more")
    process.send_signal(signal.SIGINT)
    log += project.finish(process, 130)
    assert "[WRK-001][BUILD] interrupted by the stop; the next start checks and commits it" in log
    (project.outside / "fine").touch()
    project.run("run", "--cap", "0")
    assert (project.agent_log(), project.items()) == (["WRK-001 build 1"], {})
    ended_well(project, {})


ACTS = {
    "start": ("orchestrator/journal", "ShutdownRequested", ()),
    "save": ("/BACKLOG.yaml", "ShutdownRequested", ("--cap", "0")),
    "commit": ("commit-tree", "CapReached", ("--cap", "0")),
}


@pytest.mark.parametrize(("act", "reason", "args"), table(ACTS, slow="save commit"))
def test_e1_e2_ctrl_c_while_a_run_begins_saves_or_makes_its_halt_commit(project: Any, act: str, reason: str, args: Any) -> None:
    """It comes from the terminal, to the whole group, at the first act that names a text; git is not hit.

    The journal of the run is written at its begin, and a repair of the backlog may be saved.
    """
    prepare(project, "WRK-001 in_progress")
    mark = str(project.outside / "interrupted")
    project.inject(
        "def watch(event, args):\n"
        f"    if event in ('os.rename', 'subprocess.Popen') and {act!r} in repr(args[:2]) and not os.path.exists({mark!r}):\n"
        f"        os.mkdir({mark!r})\n"
        "        os.killpg(0, signal.SIGINT)\n"
    )
    log = project.finish(project.start("run", *args), 130 if reason == "ShutdownRequested" else 0)
    assert (project.outside / "interrupted").exists()
    assert project.agent_log() == []
    assert project.subjects()[:2] == [HALT.replace("ShutdownRequested", reason), "Set up"], log
    assert project.paths() == ["BACKLOG.yaml"]
    assert f"({reason})" in log
    ended_well(project, {"WRK-001": "in_progress plan"})


@pytest.mark.slow
def test_ctrl_c_while_the_event_loop_closes_is_no_noise(project: Any) -> None:
    prepare(project, "WRK-001 ready")
    project.inject(
        "import asyncio.selector_events as events\n"
        "close = events.BaseSelectorEventLoop._close_self_pipe\n"
        "events.BaseSelectorEventLoop._close_self_pipe = lambda loop: (close(loop), os.kill(os.getpid(), signal.SIGINT))\n"
        "def watch(event, args): pass\n"
    )
    log = project.finish(project.start("run", "--cap", "0"), 0)
    assert "Traceback" not in log
    assert "Halt: the limit for this run is used up (CapReached)" in log
    ended_well(project, {"WRK-001": "in_progress plan"})


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [True, False], ids=["nohup", "terminal gone"])
def test_a_terminal_that_goes_away_is_no_reason_to_lose_anything(project: Any, nohup: bool) -> None:
    """HUP, and nobody reads what is logged any more; below nohup the run goes on."""
    prepare(project, "WRK-001 ready", script={"*": [{"announce": True, "await": "go", "document": "p.md"}]})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        process = project.start("run", "--cap", "1")
    finally:
        signal.signal(signal.SIGHUP, before)
    project.announced()
    process.stderr.close()
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    if nohup:
        (project.outside / "go").write_text("")
    assert process.wait(timeout=60) == (0 if nohup else 129)
    ended_well(project, {"WRK-001": f"in_progress {'build' if nohup else 'plan'}"})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the process table is read from /proc")
def test_i4_an_internal_error_ends_the_agents_too(project: Any) -> None:
    """Two agents; one switches the branch, which stops the run: the other does not outlive it."""
    prepare(project, "WRK-001 ready", "WRK-002 ready", phases="plan", execution="max_wip = 2\nmax_concurrent = 2", script={
        "WRK-001/plan": [{"announce": True, "await": "go", "sh": "true", "document": "p.md"}],
        "WRK-002/plan": [{**HANG, "on_term": "ignore", "sh": DEAF_CHILD.format(project.outside)}],
    }, kill_grace_seconds=0.1)
    os.mkfifo(project.outside / "ready")
    process = project.start("run")
    assert {project.announced(), project.announced()} == {"WRK-001 plan 1", "WRK-002 plan 1"}
    project.git("switch", "-q", "-c", "elsewhere")
    (project.outside / "go").write_text("")
    log = project.finish(process, 1)
    assert "switched from main to elsewhere" in log
    assert "Traceback" not in log
    assert project.survivors() == []
