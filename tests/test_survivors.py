"""No process of an agent outlives its attempt, whatever it is and however the attempt ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere than on Linux the promise is weaker"),
]

# Each starts one process that writes its pid to $P and then sleeps; a deaf one ignores TERM.
SLEEPER = "echo $$ > $P; exec sleep 1000\n"
DEAF = "trap '' TERM HUP INT; echo $$ > $P; while :; do sleep 1000; done\n"
KINDS = {
    "child": "sh $S &",
    "nohup": "nohup sh $S > /dev/null 2>&1 < /dev/null &",
    "session of its own": "setsid sh $S &",
    "deaf to TERM": "sh $D &",
    "deaf in a session of its own": "setsid sh $D &",
    "forked twice": "sh -c '(sh $S &)'",
    "forked twice into a session": "(setsid sh -c '(sh $S &)' &)",
    "empty environment": "env -i P=$P setsid sh $S &",
    "empty environment, deaf, forked twice into a session": "(env -i P=$P setsid sh $D &)",
}
ENDINGS = ("timeout", "idle", "signal", "kill", "kill, two at work")


def birth(pid: int) -> int | None:
    """When a living process started; None if there is none."""
    one = processes(pid).get(pid)
    return one.start if one and one.alive else None


def wait_for(what: str, condition: Any) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.02)


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_survives(project: Any, tmp_path: Path, ending: str) -> None:
    """All kinds at once, for each ending."""
    folder = tmp_path / "pids"
    folder.mkdir()
    (tmp_path / "sleeper").write_text(SLEEPER)
    (tmp_path / "deaf").write_text(DEAF)
    shell = f"export P S={tmp_path}/sleeper D={tmp_path}/deaf\n"
    shell += "".join(f"P={folder}/{n}\n{text}\n" for n, text in enumerate(KINDS.values()))
    limits = {"timeout": "timeout_minutes = 0.1\n", "idle": ""}.get(ending, "")
    idle = "idle_timeout_minutes = 0.1" if ending == "idle" else ""
    two = ending == "kill, two at work"
    project.configure("build" if two else "build!", more=limits, execution=f"max_retries = 0\nmax_wip = 2\nmax_concurrent = 2\n{idle}")
    project.set_up(*(f"WRK-00{n} in_progress phase=build phase_pool=main" for n in range(1, 2 + two)))
    files = [folder / str(n) for n in range(len(KINDS))]
    step = {"sh": shell + "".join(f"while ! [ -s {one} ]; do sleep 0.02; done\n" for one in files), "write": {"a.txt": "1\n"}}
    project.script({"WRK-001/*": [{**step, "hang": True}, {"write": {"b.txt": "1\n"}}], "*": [{"announce": True, "hang": True}]})
    process = project.start("run", "--cap", f"{1 + two}")
    if two:
        project.announced()
    wait_for("not all have started", lambda: all(one.exists() and one.read_text().strip() for one in files))
    pids = [int(one.read_text()) for one in files]
    born = dict(zip(KINDS, [(pid, birth(pid)) for pid in pids], strict=True))
    assert None not in [start for _, start in born.values()]
    if ending == "signal":
        process.send_signal(signal.SIGTERM)
    if ending.startswith("kill"):
        journal = project.root / ".git/orchestrator/journal"
        unmarked = [pid for kind, (pid, _) in born.items() if "empty" in kind]
        wait_for("not journalled", lambda: all(f"{pid}" in journal.read_text() for pid in unmarked))
        process.kill()
        process.communicate()
        assert {kind for kind, (pid, start) in born.items() if birth(pid) == start} >= {"session of its own", *(k for k in KINDS if "empty" in k)}
        log = project.run("run", "--cap", "0", *["--allow-dirty"] * two).stderr  # only a phase that runs alone is set aside
        assert log.count("ended a process that an agent left behind") >= len(KINDS)
    else:
        log = project.finish(process, 143 if ending == "signal" else 3)
    left = [kind for kind, (pid, start) in born.items() if birth(pid) == start]
    for pid, start in born.values():
        if birth(pid) == start:
            os.kill(pid, signal.SIGKILL)
    assert left == []
    assert project.survivors() == []
    if ending in ("timeout", "idle"):
        assert "timed out" in log
    assert project.committed() == project.text()


def test_a_foreign_job_with_our_mark_ends_with_the_attempt(project: Any) -> None:
    """Started by somebody else's daemon with the agent's environment, as `at now` does it."""
    project.set_up("WRK-001 in_progress phase=plan phase_pool=main", phases="plan build!")
    waits = {"announce": True, "await": "go"}
    project.script({
        "*/plan": [{"sh": f"env -0 > {project.outside}/env", "document": "p.md", **waits}],
        "*/build": [{**waits, "write": {"a.txt": "1\n"}}],
    })
    process = project.start("run", "--cap", "2")
    project.announced()
    variables = (project.outside / "env").read_text().split("\0")
    env = dict(one.split("=", 1) for one in variables if one)
    with subprocess.Popen(["sleep", "1000"], env=env, start_new_session=True) as job:
        (project.outside / "go").write_text("")
        project.announced()
        ended = job.poll()
        job.kill()
    (project.outside / "go").write_text("")
    project.finish(process)
    assert ended == -signal.SIGKILL
