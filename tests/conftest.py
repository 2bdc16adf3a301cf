"""Hermetic surroundings for every test: own HOME, no global git configuration, no GIT_* variables."""

import gc
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import pytest

import orchestrator
from backlog import parse_yaml

IDENTITY = {
    "GIT_AUTHOR_NAME": "Operator",
    "GIT_AUTHOR_EMAIL": "operator@example.invalid",
    "GIT_COMMITTER_NAME": "Operator",
    "GIT_COMMITTER_EMAIL": "operator@example.invalid",
}


def pytest_configure() -> None:
    """All files in memory where there is room for them: the tests are for the most part small files and git."""
    with suppress(OSError, AttributeError):
        room = os.statvfs("/dev/shm")
        if room.f_bavail * room.f_frsize > 2 << 30 and not room.f_flag & os.ST_NOEXEC:  # agents are scripts
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")


@pytest.fixture(autouse=True, scope="session")
def hermetic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private HOME and a clean environment."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # below nohup the command would ignore it
    base = tmp_path_factory.getbasetemp()
    (base / "home").mkdir()
    ours = {
        **IDENTITY, "HOME": f"{base}/home", "XDG_CONFIG_HOME": f"{base}/home/.config", "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C.UTF-8", "TZ": "UTC", "PYTHONPYCACHEPREFIX": f"{base}/pycache",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("GIT_", "ORCHESTRATOR_", "CLAUDE")) and name != "ORCHESTRATOR_CORPUS":
                patch.delenv(name)
        # Where no compiled form may be written, each of hundreds of commands would compile the modules anew.
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        for name, value in ours.items():
            patch.setenv(name, value)
        yield
    signal.signal(signal.SIGHUP, hangup)


@pytest.fixture
def corpus() -> Path:
    """The folder of real backlog files and YAML cases, if this machine has it."""
    where = os.environ.get("ORCHESTRATOR_CORPUS")
    if not where:
        pytest.skip("ORCHESTRATOR_CORPUS is not set")
    return Path(where)


def sh(cwd: Path, *argv: str, check: bool = True) -> str:
    """Run a command of the test's own (mostly git) and return its standard output."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, errors="surrogateescape")
    if check and done.returncode:
        raise AssertionError(f"{argv} exited {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


@pytest.fixture
def make_repo(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a git repository with one commit holding README.md; returns its path."""
    template = tmp_path_factory.getbasetemp() / "template-repo"
    if not template.exists():
        template.mkdir()
        sh(template, "git", "init", "-q", "-b", "main")
        sh(template, "git", "config", "maintenance.auto", "false")  # else each commit starts one more process
        for sample in (template / ".git/hooks").iterdir():  # not to be copied hundreds of times
            sample.unlink()
        (template / "README.md").write_text("A project\n")
        sh(template, "git", "add", "README.md")
        sh(template, "git", "commit", "-q", "-m", "Start")

    def make(name: str = "repo") -> Path:
        return Path(shutil.copytree(template, tmp_path / name, symlinks=True))

    return make


HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "orchestrator.py"
# Commands that are called, not started, where that is the same: a start costs more than what they do.
AT_HAND = {"add", "check", "close", "edit", "log", "logs", "show", "status", "stop", "unblock"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vendored", action="store_true",
        help="start the command from its single file; only tests that start it are run",
    )  # fmt: skip


def pytest_collection_finish() -> None:
    gc.freeze()  # thousands of tests, which every collection would go through again


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --vendored, tests that call functions or commands of the modules are left out."""
    if config.getoption("vendored"):
        names = [(one, getattr(one, "fixturenames", ())) for one in items]
        others = [one for one, has in names if "program" not in has or "cli" in has]
        config.hook.pytest_deselected(items=others)
        items[:] = [one for one in items if one not in others]


@pytest.fixture(scope="session")
def program(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that tests start as the command: that of the sources, or the single file."""
    if not pytestconfig.getoption("vendored"):
        return SOURCE
    built = tmp_path_factory.mktemp("vendored") / "orchestrator.py"
    sh(HERE, sys.executable, str(SOURCE), "vendor", str(built))
    spec = importlib.util.spec_from_file_location("single_file", built)
    assert spec
    assert spec.loader
    Project.module = sys.modules["single_file"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(Project.module)
    return built


SCRIPTED_AGENT = r"""
# An agent that does what script.json beside it says; keeps its own log outside the repository.
import json, os, sys

here = os.path.dirname(os.path.abspath(__file__))
env = os.environ
item, phase, attempt = (env["ORCHESTRATOR_" + name] for name in ("ITEM_ID", "PHASE", "ATTEMPT"))
prompt = sys.stdin.read()
with open(here + "/agent.log", "a") as log:
    log.write(f"{item} {phase} {attempt}\n")
with open(f"{here}/prompt-{item}-{phase}-{attempt}.md", "w") as copy:
    copy.write(prompt)
with open(here + "/script.json") as file:
    script = json.load(file)
steps = next((script[key] for key in (f"{item}/{phase}", f"*/{phase}", f"{item}/*", "*") if key in script), [{}])
with open(here + "/agent.log") as log:
    visit = sum(line.startswith(f"{item} {phase} ") for line in log)
step = steps[min(visit, len(steps)) - 1]
if "on_term" in step or "hang" in step:
    import signal
if step.get("on_term") == "ignore":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if step.get("on_term") == "finish":  # wait for it, then go on to the result; it may come first
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
for path, text in step.get("write", {}).items():
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
if "document" in step:
    with open(os.path.join(env["ORCHESTRATOR_CHANGE_DIR"], step["document"]), "w") as file:
        file.write(f"{item} {phase} {attempt}\n")
if "sh" in step and os.spawnlp(os.P_WAIT, "sh", "sh", "-c", step["sh"]):
    sys.exit(1)
if "announce" in step:
    with open(here + "/announce", "w") as fifo:
        fifo.write(f"{item} {phase} {attempt}\n")
if "await" in step:
    with open(here + "/" + step["await"]) as fifo:
        fifo.read()
if step.get("hang"):
    signal.sigwait({signal.SIGTERM}) if step.get("on_term") == "finish" else signal.pause()
result = {"item_id": item, "phase": phase, "result": "phase_complete", "summary": f"{phase} done"}
if phase == "triage":
    result["updated_assessments"] = {"size": "small", "complexity": "low", "risk": "low", "impact": "medium"}
result.update(step.get("result", {}))
if step.get("result", {}) is not None and not step.get("no_result"):
    with open(env["ORCHESTRATOR_RESULT_PATH"], "w") as file:
        json.dump(result, file)
sys.exit(step.get("exit", 0))
"""

TIMES = "  created: 2026-01-01T00:00:00+00:00\n  updated: 2026-01-01T00:00:00+00:00\n"


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def in_process(*argv: str, module: ModuleType = orchestrator) -> Done:
    """Run a command within this process."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            found = module.main(list(argv))
        except SystemExit as end:
            found = int(end.code or 0)
    return Done(found, out.getvalue(), err.getvalue())


def call_main(module: ModuleType, words: list[str], env: dict[str, str], injected: str) -> NoReturn:
    """What a forked process does in place of a start of Python: the command, in its own surroundings."""
    os.closerange(3, 1 << 16)  # that of `Popen` as well, which waits for it
    gc.freeze()
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    code = 1
    try:
        exec(injected, {})
        code = module.main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Project:
    """A repository with a backlog and a scripted agent, driven through the real command."""

    program: Path  # what is started as the command; see the fixture of this name
    module: ModuleType = orchestrator  # the same, imported

    def __init__(self, root: Path, outside: Path) -> None:
        self.root = root
        self.outside = outside
        self.heard: list[str] = []
        self.started: list[subprocess.Popen[str]] = []
        self.injected = ""  # Python that the command begins with
        self.launcher: tuple[str, ...] = ()  # a command that starts the command
        self.environment: dict[str, str | None] = {}  # beside our own; None takes a variable away
        self.at_end: list[Callable[[], object]] = []
        self.patience = 60  # seconds that a command may take
        outside.mkdir()
        (outside / "agent.py").write_text(SCRIPTED_AGENT)
        os.mkfifo(outside / "announce")
        self.script({})

    def script(self, steps: dict[str, Any]) -> None:
        """What the agent does, by `ITEM/PHASE`, `*/PHASE`, `ITEM/*` or `*`: one step per visit."""
        for name in {step["await"] for visits in steps.values() for step in visits if "await" in step}:
            if not (self.outside / name).exists():
                os.mkfifo(self.outside / name)
        (self.outside / "script.json").write_text(json.dumps(steps))

    def configure(self, phases: str = "plan build!", more: str = "", execution: str = "", agent: str = "") -> None:
        """Write orchestrator.toml: `!` marks a destructive phase, `?` a pre-phase."""
        script = agent or str(self.outside / "agent.py")
        command = json.dumps([sys.executable, "-E", "-S", script])
        text = f'[agent]\ncli = "command"\ncommand = {command}\n'
        text += f"[execution]\nretry_delay_seconds = 0\nkill_grace_seconds = 5\n{execution}\n"
        for word in phases.split():
            kind = "pre_phases" if word.endswith("?") else "phases"
            text += f'[[pipelines.feature.{kind}]]\nname = "{word.rstrip("!?")}"\n'
            text += "destructive = true\n" if word.endswith("!") else ""
        (self.root / "orchestrator.toml").write_text(text + more)

    def backlog(self, *items: str, head: str = "") -> None:
        """Write BACKLOG.yaml; an item is `ID status [key=value]…`."""
        rows = []
        for item in items:
            item_id, status, *fields = item.split()
            rows.append(f"- id: {item_id}\n  title: Item {item_id}\n  status: {status}\n")
            rows += [f"  {key}: {value}\n" for key, _, value in (f.partition("=") for f in fields)]
            rows.append("  requires_human_review: false\n" + TIMES)
        body = "items:\n" + "".join(rows) if rows else "items: []\n"
        text = f"{head}schema_version: 3\n{body}next_item_id: {len(items)}\n"
        (self.root / "BACKLOG.yaml").write_text(text)

    def set_up(self, *items: str, script: dict[str, Any] | None = None, head: str = "", **config: str) -> None:
        """Backlog, config if it is a special one, and what else lies about, committed; and what the agent does."""
        if config:
            self.configure(**config)
        self.backlog(*items, head=head)
        self.commit_all()
        if script is not None:
            self.script(script)

    def hook(self, name: str, body: str) -> None:
        """A hook of the operator's; its interpreter is a shell if none is named."""
        path = self.root / ".git/hooks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def commit_all(self, message: str = "Set up") -> None:
        sh(self.root, "git", "add", "-A")
        sh(self.root, "git", "commit", "-q", "-m", message)

    def run(self, *args: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run the command to its end; asserts the exit code unless it is None."""
        changed = self.launcher or self.environment or self.injected
        if args[0] in AT_HAND and not changed:
            with chdir(self.outside):
                found, out, err = in_process("--root", str(self.root), *args, module=self.module)
        else:
            process = self.start(*args)
            out, err = process.communicate(timeout=self.patience)
            found = process.returncode
        if code not in (found, None):
            raise AssertionError(f"{args} exited {found}, not {code}:\n{out}{err}")
        return subprocess.CompletedProcess(args, found, out, err)

    def start(self, *args: str) -> subprocess.Popen[str]:
        # As a module, so that its compiled form is used: a script is compiled at every start.
        words = ["--root", str(self.root), *args]
        argv = [*self.launcher, sys.executable, "-m", self.program.stem, *words]
        path = f"{self.outside / 'inject'}{os.pathsep}{self.program.parent}"
        env = {k: v for k, v in {**os.environ, "PYTHONPATH": path, **self.environment}.items() if v is not None}
        forked = not self.launcher and sys.platform == "linux"  # nothing is to be imported
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.outside,
            start_new_session=True, restore_signals=not forked, env=env,
            preexec_fn=partial(call_main, self.module, words, env, self.injected) if forked else None,
        )
        self.started.append(process)
        return process

    def inject(self, watch: str) -> None:
        """Give the command an audit hook, `watch(event, args)`; an empty text takes it away."""
        (self.outside / "inject").mkdir(exist_ok=True)
        self.injected = f"import os, signal, sys\n{watch}\nsys.addaudithook(watch)\n" if watch else ""
        (self.outside / "inject/sitecustomize.py").write_text(self.injected)

    def survivors(self) -> list[int]:
        """Processes that an attempt in this project started, by what their environment says."""
        mark = f"ORCHESTRATOR_PROMPT_FILE={self.root}/".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():  # empty for a zombie
                    found.append(int(entry.name))
        return found

    def end(self) -> None:
        """Leave nothing behind, also when a test fails half-way."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            process.wait()
        for pid in self.survivors():
            os.kill(pid, signal.SIGKILL)
        for act in self.at_end:
            act()

    def read_until(self, process: subprocess.Popen[str], text: str) -> str:
        """Read what a started command logs up to a line with `text`; returns it all."""
        lines = []
        assert process.stderr
        limit = threading.Timer(self.patience, process.kill)
        limit.start()
        try:
            for line in process.stderr:
                lines.append(line)
                if text in line:
                    return "".join(lines)
        finally:
            limit.cancel()
        raise AssertionError(f"{text!r} was never logged:\n{''.join(lines)}")

    def finish(self, process: subprocess.Popen[str], code: int | None = 0) -> str:
        """Wait for a started command; returns the (rest of the) log; asserts the exit code unless it is None."""
        assert process.stderr
        assert process.stdout
        with process:
            err, out = process.stderr.read(), process.stdout.read()
        if code not in (process.returncode, None):
            raise AssertionError(f"exited {process.returncode}, not {code}:\n{out}{err}")
        return err

    def announced(self) -> str:
        """Block until the agent announces itself; returns `ITEM PHASE ATTEMPT`."""
        while not self.heard:  # two agents may announce themselves at once
            handle = os.open(self.outside / "announce", os.O_RDONLY | os.O_NONBLOCK)
            with open(handle) as fifo:
                poll = select.poll()
                poll.register(handle, select.POLLIN)
                if not poll.poll(60_000):
                    raise AssertionError("no agent has announced itself")
                os.set_blocking(handle, True)
                self.heard += fifo.read().splitlines()
        return self.heard.pop(0)

    def agent_log(self) -> list[str]:
        log = self.outside / "agent.log"
        return log.read_text().splitlines() if log.exists() else []

    def git(self, *args: str) -> str:
        return sh(self.root, "git", *args)

    def subjects(self) -> list[str]:
        """Subjects of all commits, newest first."""
        return self.git("log", "--format=%s").splitlines()

    def paths(self, commit: str = "HEAD") -> list[str]:
        """The paths that a commit changes."""
        out = self.git("diff-tree", "-r", "-z", "--root", "--no-commit-id", "--name-only", commit)
        return [path for path in out.split("\0") if path]

    def worklog(self) -> str:
        return "".join(path.read_text() for path in sorted((self.root / "_worklog").glob("*.md")))

    def killed(self, *args: str, agents: int = 1) -> None:
        """A run that is killed once so many agents have announced themselves."""
        process = self.start("run", *args)
        for _ in range(agents):
            self.announced()
        process.kill()
        process.communicate()

    def status(self) -> str:
        return self.git("status", "--porcelain")

    def committed(self) -> str:
        return self.git("show", "HEAD:BACKLOG.yaml")

    def text(self) -> str:
        return (self.root / "BACKLOG.yaml").read_text()

    def items(self) -> dict[str, dict[str, Any]]:
        """The items of the file by id."""
        backlog: Any = parse_yaml((self.root / "BACKLOG.yaml").read_bytes())
        return {row["id"]: row for row in backlog["items"]}

    def titles(self) -> dict[str, str]:
        return {item_id: row["title"] for item_id, row in self.items().items()}

    def statuses(self) -> dict[str, str]:
        """Status and phase by id."""
        return {row["id"]: " ".join(filter(None, (row["status"], row.get("phase")))) for row in self.items().values()}


@pytest.fixture
def project(
    make_repo: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, program: Path
) -> Iterator[Project]:
    """A project with two-phase pipeline (plan, build) and an empty backlog, all committed."""
    Project.program = program
    template = tmp_path_factory.getbasetemp() / "template-project"
    if not template.exists():
        first = Project(make_repo(), tmp_path / "outside")
        first.configure(agent="../outside/agent.py")
        first.backlog()
        first.commit_all()
        first.root.rename(template)
        shutil.rmtree(first.outside)
    root = Path(shutil.copytree(template, tmp_path / "repo", symlinks=True))
    one = Project(root, tmp_path / "outside")
    yield one
    one.end()


Cli = Callable[..., Done]


@pytest.fixture
def cli() -> Cli:
    """Run a command in this process; asserts its exit code."""

    def call(*argv: str | Path, code: int = 0) -> Done:
        done = in_process(*map(str, argv))
        assert done.code == code, f"{argv} exited {done.code}, not {code}:\n{done.out}{done.err}"
        assert "Traceback" not in done.err
        return done

    return call


@pytest.fixture
def here(project: Project, cli: Cli) -> Cli:
    """The same, on the project."""
    return lambda *argv, code=0: cli("--root", project.root, *argv, code=code)
