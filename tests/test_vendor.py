"""`vendor` and `--version`: one readable file that does what the three modules do."""

import builtins
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import orchestrator
from orchestrator import MODULE_ORDER, build_single_file, single_file_state

HERE = Path(__file__).resolve().parent.parent
SOURCES = {name: (HERE / f"{name}.py").read_text() for name in MODULE_ORDER}


@pytest.fixture(scope="module")
def built() -> str:
    return build_single_file(SOURCES)


@pytest.fixture(scope="module")
def single(built: str, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The single file, imported; its `vendor` copies, which is quicker than to build."""
    program = tmp_path_factory.mktemp("single") / "single_file.py"
    program.write_text(built)
    spec = importlib.util.spec_from_file_location("single_file", program)
    assert spec
    assert spec.loader
    module = sys.modules["single_file"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vendor(single: ModuleType) -> Callable[..., None]:
    def call(*argv: str | Path, code: int = 0) -> None:
        assert single.main(["vendor", *map(str, argv)]) == code

    return call


def isolated(program: Path, cwd: Path, *argv: str) -> str:
    """Run a program without site-packages, environment and its own folder on the path."""
    git = shutil.which("git")
    assert git
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(program), *argv], cwd=cwd, env={"PATH": os.path.dirname(git)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def digest_of(built: str) -> str:
    return built.partition("# sha256 of all below: ")[2].partition("\n")[0]


def test_every_module_is_there_as_it_was_written(built: str) -> None:
    """In order, between marks; only what cannot stand twice or means nothing in one file goes."""
    ours = re.compile(rf"^from (?:{'|'.join(MODULE_ORDER)}) import (?:\([^)]*\)|.*)\n", re.M)
    place = 0
    for name, text in SOURCES.items():
        begin, end = (built.index(f"# #### {word} {name}.py ", place) for word in ("begin", "end"))
        code = ours.sub("", text.removeprefix("#!/usr/bin/env python3\n")).replace(orchestrator.FUTURE, "")
        assert built[begin:end].partition("\n")[2].strip() == code.strip()
        place = end
    assert (built.count("#!/usr/bin/env python3\n"), built.count(orchestrator.FUTURE)) == (1, 1)
    assert re.findall(rf"^\s*(?:from|import) (?:{'|'.join(MODULE_ORDER)})\b.*", built, re.M) == []


def test_two_builds_are_identical_and_hold_no_time_or_place(built: str) -> None:
    assert build_single_file(dict(SOURCES)) == built
    assert str(HERE) not in built
    assert len(built.encode()) <= 600_000


def test_the_licence_is_in_it_and_the_digest_is_of_what_is_below(built: str) -> None:
    assert orchestrator.LICENCE_TEXT.split() == (HERE / "LICENSE").read_text().split()
    assert orchestrator.LICENCE_TEXT in built
    source = digest_of(built)
    assert source == hashlib.sha256(built.partition(f"{source}\n")[2].encode()).hexdigest()
    assert single_file_state(built.encode()) == (source, "unmodified")
    assert single_file_state(built.replace("EXIT_OK = ", "EXIT_OK  = ", 1).encode()) == (source, "MODIFIED")
    assert [single_file_state(text.encode()) for text in SOURCES.values()] == [("", "")] * 3


def test_no_name_means_two_things_in_one_file() -> None:
    known: dict[str, object] = {}
    for name in MODULE_ORDER:
        for word, value in vars(importlib.import_module(name)).items():
            if not word.startswith("__"):
                assert known.setdefault(word, value) is value, f"{name}.{word} means another thing in an earlier module"
                assert not hasattr(builtins, word)


@pytest.mark.slow
def test_the_single_file_works_alone_in_an_empty_folder(tmp_path: Path) -> None:
    """Version, `vendor` of itself, `init` and an item; without site-packages, from a file of any name."""
    empty, made = tmp_path / "empty", tmp_path / "bin" / "orch.py"
    empty.mkdir()
    assert orchestrator.main(["vendor", str(made)]) == 0
    assert made.stat().st_mode & 0o7777 == 0o755
    source = digest_of(build_single_file(SOURCES))[:12]
    assert isolated(made, empty, "--version") == f"orchestrator {orchestrator.__version__} (single file, source {source}, unmodified)\n"
    said = isolated(made, empty, "vendor", ".")
    assert said == f"wrote {empty}/orchestrator.py\n"
    assert (empty / "orchestrator.py").read_bytes() == made.read_bytes()
    subprocess.run(["git", "init", "-q", "."], cwd=empty, check=True)
    isolated(made, empty, "init", "--hook")
    assert isolated(made, empty, "add", "A title") == "Added WRK-001: A title\n"
    assert os.access(empty / ".git/hooks/pre-commit", os.X_OK)
    assert [path.name for path in made.parent.iterdir()] == ["orch.py"]  # no __pycache__


def test_the_agents_of_its_demo_are_the_single_file_itself(single: ModuleType) -> None:
    """Started as a script, not imported: it may have any name, and leaves no cache beside it."""
    config = single.default_config(Path("/"))
    site = SimpleNamespace(config=config._replace(agent=config.agent._replace(cli="demo", args=("--more",))))
    attempt = SimpleNamespace(task=SimpleNamespace(phase=single.Phase("build")))
    assert single.agent_argv(site, attempt) == [sys.executable, "-E", "-S", single.__file__, single.DEMO_AGENT, "--more"]


def test_the_command_that_these_tests_start_is_the_one_that_was_asked_for(project: Any, pytestconfig: pytest.Config) -> None:
    said = project.run("--version").stdout
    assert ("single file" if pytestconfig.getoption("vendored") else "three modules") in said


def test_a_modified_single_file_says_so(
    tmp_path: Path, built: str, single: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "orchestrator.py"
    program.write_text(built.replace("never lose a decision", "often lose one", 1))
    monkeypatch.setattr(single, "__file__", str(program))
    assert single.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(", MODIFIED)\n")


OTHER_VERSION = build_single_file({"gitutil": "ONE = 1\n", "orchestrator": "from gitutil import ONE\n"})


@pytest.mark.parametrize(
    ("there", "replaced"),
    [(OTHER_VERSION, True), (OTHER_VERSION + "# mine\n", False), ("print('mine')\n", False), ("", False)],
    ids=["another version", "changed", "foreign", "empty"],
)
def test_only_an_untouched_single_file_is_replaced(
    tmp_path: Path, built: str, vendor: Callable[..., None], capsys: pytest.CaptureFixture[str], there: str, replaced: bool
) -> None:
    path = tmp_path / "orchestrator.py"
    path.write_text(there)
    vendor(path, code=0 if replaced else 1)
    assert path.read_text() == (built if replaced else there)
    assert replaced or capsys.readouterr().err == f"orchestrator: {path} is no untouched single file of ours; remove it first\n"
    assert [one.name for one in tmp_path.iterdir()] == ["orchestrator.py"]


@pytest.mark.parametrize("name", ["there", "new/", "tools"])
def test_a_folder_holds_the_file_by_its_usual_name_and_a_link_is_followed(
    tmp_path: Path, built: str, vendor: Callable[..., None], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "there").mkdir()
    vendor(f"{tmp_path}/{name}")
    assert (tmp_path / name / "orchestrator.py").read_text() == built
    (tmp_path / "link.py").symlink_to("target.py")
    vendor(tmp_path / "link.py")
    assert (tmp_path / "link.py").is_symlink()
    assert (tmp_path / "target.py").read_text() == built
    os.mkfifo(tmp_path / "fifo.py")
    capsys.readouterr()
    vendor(tmp_path / "fifo.py", code=1)
    assert capsys.readouterr().err.startswith(f"orchestrator: {tmp_path}/fifo.py is no ")
