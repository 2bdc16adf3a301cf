"""`vendor` and `--version`: one readable file that does what the three modules do."""

from __future__ import annotations

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
from orchestrator import MODULE_ORDER, OrchestratorError, build_single_file, read_single_file

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
    module = importlib.util.module_from_spec(spec)
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


# ---- The file ------------------------------------------------------------------------------------


def test_every_line_of_code_is_there_as_it_was_written(built: str) -> None:
    """In order, comments and docstrings included; only imports and the blank lines round them go."""
    place = built.index("# #### begin gitutil.py ")
    for name, text in SOURCES.items():
        begin, end = (built.index(f"# #### {word} {name}.py ", place) for word in ("begin", "end"))
        code = text[text.index("# ==== 1. ") :]
        assert code.rstrip("\n") in built[begin:end]
        place = end
    docstrings = [text.split('"""')[1] for text in SOURCES.values()]
    assert f'"""{docstrings[-1]}"""\n' in built
    for docstring in docstrings[:-1]:
        assert "".join(f"# {line}".rstrip() + "\n" for line in docstring.splitlines()) in built


def test_imports_are_together_at_the_top_and_none_is_of_our_modules(built: str) -> None:
    top = built.partition('"""\n\n')[2].partition("# #### begin")[0]
    imports = re.findall(r"^(?:from|import) .*", top, re.M)
    assert imports[0] == "from __future__ import annotations"
    modules = [(line.startswith("from "), line.split()[1]) for line in imports[1:]]
    assert modules == sorted(set(modules))  # once each, and in the same order in each build
    assert re.findall(rf"^\s*(?:from|import) (?:{'|'.join(MODULE_ORDER)})\b.*", built, re.M) == []


def test_two_builds_are_identical_and_hold_no_time_or_place(built: str) -> None:
    assert build_single_file(dict(SOURCES)) == built
    assert str(HERE) not in built
    assert len(re.findall(r"[0-9a-f]{64}", built)) == len(re.findall(r"[0-9a-f]{64}", "".join(SOURCES.values()))) + 2


def test_licence_and_hook_are_those_of_the_files(built: str) -> None:
    licence = (HERE / "LICENSE").read_text()
    assert licence == orchestrator.LICENCE_TEXT
    assert (HERE / "hooks/pre-commit").read_text() == orchestrator.HOOK_TEXT
    assert "".join(f"# {line}".rstrip() + "\n" for line in licence.splitlines()) in built.partition('"""')[0]


def test_digests_are_of_the_sources_and_of_what_is_below(built: str) -> None:
    source, below = re.findall(r"^# (?:source|below)-sha256: ([0-9a-f]{64})$", built, re.M)
    digest = hashlib.sha256()
    for name, text in SOURCES.items():
        digest.update(f"{name}.py {len(text.encode())}\n".encode() + text.encode())
    assert source == digest.hexdigest() == orchestrator.source_digest(SOURCES)
    assert below == hashlib.sha256(built.partition(f"{below}\n")[2].encode()).hexdigest()
    assert read_single_file(built.encode()) == (source, False)
    assert read_single_file(built.replace("PARKED_REF = ", "PARKED_REF  = ", 1).encode()) == (source, True)
    assert [read_single_file(text.encode()) for text in SOURCES.values()] == [None] * 3


# ---- What cannot be joined -----------------------------------------------------------------------

SMALL = {
    "gitutil": '"""One."""\n\nimport os\nfrom time import sleep\n\n\ndef one():\n    import json\n',
    "backlog": '"""Two."""\n\nimport os\n\n\nTWO = [one for one in os.environ]\n',
    "orchestrator": '#!/usr/bin/env python3\n"""Three."""\n\nfrom time import monotonic, sleep\n\nfrom gitutil import one\n\n\nTHREE = one\n',
}

CLASHES = [
    ("backlog", "def one():\n    pass\n", "backlog.py:7: one is also gitutil.one (gitutil.py:7); rename one"),
    ("backlog", "one = TWO\n", "backlog.py:7: one is also gitutil.one (gitutil.py:7); rename one"),
    ("backlog", "one: int = 1\n", "backlog.py:7: one is also gitutil.one (gitutil.py:7); rename one"),
    ("backlog", "if TWO:\n    a, (*b, one) = TWO\n", "backlog.py:8: one is also gitutil.one (gitutil.py:7); rename one"),
    ("backlog", "class sleep:\n    pass\n", "backlog.py:7: sleep is also time.sleep (gitutil.py:4); rename one"),
    ("backlog", "from asyncio import sleep\n", "backlog.py:7: sleep is also time.sleep (gitutil.py:4); rename one"),
    ("backlog", "try:\n    import sleep\nexcept ImportError:\n    pass\n", "backlog.py:8: sleep is also time.sleep (gitutil.py:4); rename one"),
    ("backlog", "def open():\n    pass\n", "backlog.py:7: open hides a builtin; rename it"),
    ("backlog", "import gitutil\n", "backlog.py:7: `import gitutil`: import names of our modules with `from`, at the top of the file"),
    ("backlog", "def two():\n    from gitutil import one\n", "backlog.py:8: `from gitutil import one`: import names of our modules with `from`, at the top of the file"),
    ("backlog", "from gitutil import one as two\n", "backlog.py:7: `from gitutil import one as two`: import names one by one and as they are"),
    ("backlog", "from gitutil import *\n", "backlog.py:7: `from gitutil import *`: import names one by one and as they are"),
    ("backlog", "import json as js\n", "backlog.py:7: `import json as js`: import names one by one and as they are"),
]


@pytest.mark.parametrize(("module", "more", "said"), CLASHES)
def test_what_would_mean_something_else_is_a_build_error_with_file_and_line(module: str, more: str, said: str) -> None:
    with pytest.raises(OrchestratorError) as caught:
        build_single_file({**SMALL, module: SMALL[module] + more})
    assert str(caught.value) == said


def test_names_inside_of_functions_and_comprehensions_clash_with_nothing() -> None:
    more = "def two(one, sleep):\n    open = one\n    THREE = open\n    return [sleep for sleep in THREE], lambda one: one\n"
    text = build_single_file({**SMALL, "backlog": SMALL["backlog"] + more})
    assert "\n\nimport os\nfrom time import monotonic, sleep\n\n\n# #### begin" in text
    assert text.startswith("#!/usr/bin/env python3\n")
    assert text.count("#!") == 1
    assert "# One.\n\ndef one():\n    import json\n\n\n# #### end gitutil.py " in text
    scope: dict[str, Any] = {}
    exec(compile(text, "single", "exec"), scope)
    assert scope["THREE"] is scope["one"]
    assert scope["__doc__"] == "Three."


# ---- The command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_single_file_works_alone_in_an_empty_folder(tmp_path: Path) -> None:
    """Version, `vendor` of itself, `init` and an item; without site-packages, from a file of any name."""
    empty, made = tmp_path / "empty", tmp_path / "bin" / "orch"
    empty.mkdir()
    assert orchestrator.main(["vendor", str(made)]) == 0
    assert made.stat().st_mode & 0o7777 == 0o755
    source = orchestrator.source_digest(SOURCES)[:12]
    assert isolated(made, empty, "--version") == f"orchestrator {orchestrator.__version__} (single file, source {source}, unmodified)\n"
    said = isolated(made, empty, "vendor", ".")
    assert said.startswith(f"wrote {empty}/orchestrator.py: orchestrator {orchestrator.__version__}, source {source}, ")
    assert (empty / "orchestrator.py").read_bytes() == made.read_bytes()
    subprocess.run(["git", "init", "-q", "."], cwd=empty, check=True)
    isolated(made, empty, "init", "--hook")
    assert isolated(made, empty, "add", "A title") == "Added WRK-001: A title\n"
    assert os.access(empty / ".git/hooks/pre-commit", os.X_OK)
    assert [path.name for path in made.parent.iterdir()] == ["orch"]  # no __pycache__


def test_the_agents_of_its_demo_are_the_single_file_itself(single: ModuleType) -> None:
    """Started as a script, not imported: it may have any name, and leaves no cache beside it."""
    settings = single.default_config(Path("/")).agent._replace(args=("--more",))
    argv = single.PROFILES["demo"].argv(SimpleNamespace(settings=settings))
    assert argv == [sys.executable, "-E", "-S", single.__file__, single.DEMO_AGENT, "--more"]


def test_the_command_that_these_tests_start_is_the_one_that_was_asked_for(project: Any, pytestconfig: pytest.Config) -> None:
    said = project.run("--version").stdout
    assert ("single file" if pytestconfig.getoption("vendored") else "three modules") in said


def test_version_of_the_modules_names_their_digest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        orchestrator.main(["--version"])
    assert caught.value.code == 0
    source = orchestrator.source_digest(SOURCES)[:12]
    assert capsys.readouterr().out == f"orchestrator {orchestrator.__version__} (three modules, source {source})\n"


def test_version_from_an_archive(tmp_path: Path) -> None:
    assert orchestrator.version_text(tmp_path / "x.pyz" / "orchestrator.py") == f"orchestrator {orchestrator.__version__} (source unreadable)"


def test_a_modified_single_file_says_so_and_does_not_copy_itself(tmp_path: Path, built: str) -> None:
    program = tmp_path / "orchestrator.py"
    program.write_text(built.replace("never lose a decision", "often lose one", 1))
    assert orchestrator.version_text(program).endswith(", MODIFIED)")
    with pytest.raises(OrchestratorError) as caught:
        orchestrator.single_file(program)
    assert str(caught.value) == f"{program} was changed by hand; take an untouched one, or the modules"


OTHER_VERSION = build_single_file(SMALL)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (OTHER_VERSION, None),
        (OTHER_VERSION + "# mine\n", "was changed by hand"),
        ("print('mine')\n", "is not a single file of the orchestrator"),
        ("", "is not a single file of the orchestrator"),
    ],
    ids=["another version", "changed", "foreign", "empty"],
)
def test_only_an_untouched_single_file_is_replaced(
    tmp_path: Path, built: str, vendor: Callable[..., None], capsys: pytest.CaptureFixture[str], there: str, said: str | None
) -> None:
    path = tmp_path / "orchestrator.py"
    path.write_text(there)
    if said:
        vendor(path, code=1)
        assert capsys.readouterr() == ("", f"orchestrator: {path} {said}; --force writes over it all the same\n")
        assert path.read_text() == there
        vendor("--force", path)
    else:
        vendor(path)
    assert path.read_text() == built
    assert path.stat().st_mode & 0o7777 == 0o755
    assert [one.name for one in tmp_path.iterdir()] == ["orchestrator.py"]


def test_a_path_that_is_no_file(vendor: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    vendor(os.devnull, "--force", code=2)
    assert capsys.readouterr().err == f"orchestrator: {os.devnull} is no file; name another path\n"


@pytest.mark.parametrize("name", ["there", "new/"])
def test_a_folder_holds_the_file_by_its_usual_name(tmp_path: Path, built: str, vendor: Callable[..., None], name: str) -> None:
    (tmp_path / "there").mkdir()
    vendor(f"{tmp_path}/{name}")
    assert (tmp_path / name / "orchestrator.py").read_text() == built


def test_a_link_is_followed(tmp_path: Path, built: str, vendor: Callable[..., None]) -> None:
    (tmp_path / "link").symlink_to("target.py")
    vendor(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target.py").read_text() == built
