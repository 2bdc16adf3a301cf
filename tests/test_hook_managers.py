"""A run in repositories with the real husky, lefthook and pre-commit, with signatures and sign-off.

`.ci/run` installs them into `.hooks`; by hand the commands are there.
"""

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.gitkit import is_alive, sign_with_a_key

TOOLS = Path(__file__).resolve().parent.parent / ".hooks"
RUFF = TOOLS / "venv/bin/ruff"

pytestmark = pytest.mark.hooks


class SetUp(NamedTuple):
    """A repository with hooks, and files of its language."""

    files: dict[str, str]
    install: str
    words: str  # of the hook, about `broken`
    commits: str = ""  # [commits] of our config
    suffix: str = ".js"
    messy: str = "const  a = 'x'\n"
    mended: str = 'const a = "x";\n'
    broken: str = "const a = ;\n"


NODE = {
    ".gitignore": "node_modules\n",
    "package.json": '{ "type": "module", "lint-staged": { "*.js": ["prettier --write", "sh slow.sh"] } }\n',
    "commitlint.config.js": 'export default { extends: ["@commitlint/config-conventional"] };\n',
}
HUSKY = {".husky/pre-commit": "lint-staged\n", ".husky/commit-msg": "commitlint --edit $1\n"}
LEFTHOOK = """\
pre-commit:
  commands:
    prettier: { glob: "*.js", run: "npx prettier --write {staged_files}", stage_fixed: true }
    slow: { run: "sh slow.sh" }
commit-msg:
  commands:
    commitlint: { run: "npx commitlint --edit {1}" }
"""
# To format leaves an import that is not used; to take it out leaves a blank line at the top.
PRE_COMMIT = f"""\
repos:
- repo: local
  hooks:
  - {{ id: format, name: format, language: system, types: [python], entry: {RUFF} format }}
  - {{ id: fix, name: fix, language: system, types: [python], entry: {RUFF} check --fix }}
  - {{ id: dco, name: dco, language: system, stages: [commit-msg], entry: grep -q ^Signed-off-by }}
  - {{ id: slow, name: slow, language: system, always_run: true, entry: sh slow.sh }}
"""
SLOW = 'test ! -e "$OUTSIDE/slow" || { echo $$ > "$OUTSIDE/slow"; echo > "$OUTSIDE/announce"; exec sleep 600; }\n'
INSTALL = f"{TOOLS}/venv/bin/pre-commit install --hook-type pre-commit"
PYTHON = {"suffix": ".py", "messy": "import os\nx  = 1\n", "mended": "x = 1\n", "broken": "x = (\n"}
BUILDS = [f"WRK-00{n} in_progress phase=build phase_pool=main" for n in (2, 3)]
CONVENTIONAL = '[commits]\nstyle = "conventional"\n'
SETUPS = {
    "husky": SetUp({**NODE, **HUSKY}, "husky", "SyntaxError", CONVENTIONAL),
    "lefthook": SetUp({**NODE, "lefthook.yml": LEFTHOOK}, "lefthook install", "SyntaxError", CONVENTIONAL),
    "pre-commit": SetUp({".pre-commit-config.yaml": PRE_COMMIT}, INSTALL, "invalid-syntax", **PYTHON),
    "signed": SetUp({".pre-commit-config.yaml": PRE_COMMIT}, f"{INSTALL} --hook-type commit-msg", "invalid-syntax", "[commits]\nsignoff = true\n", **PYTHON),
}  # fmt: skip


def prepare(project: Any, name: str, execution: str = "") -> SetUp:
    """A repository as its team has it, with three items to build."""
    setup = SETUPS[name]
    if not (TOOLS / ("node_modules" if setup.suffix == ".js" else "venv/bin/pre-commit")).exists():
        pytest.skip(f"what {name} needs is not installed in .hooks")
    for path, text in {**setup.files, "slow.sh": SLOW, f"own{setup.suffix}": setup.mended}.items():
        (project.root / path).parent.mkdir(exist_ok=True)
        (project.root / path).write_text(text)
    project.set_up("WRK-001 in_progress phase=plan phase_pool=main", *BUILDS, more=setup.commits, execution=execution)
    if setup.suffix == ".js":
        (project.root / "node_modules").symlink_to(TOOLS / "node_modules")
    project.environment["OUTSIDE"] = str(project.outside)
    project.environment["PRE_COMMIT_HOME"] = str(project.outside / "cache")
    project.patience = 300
    shell(project, setup.install)
    if name == "signed":
        sign_with_a_key(project.root, project.outside)
    result = {"summary": "API limits, as agreed upon.", "commit_type": "fix"}

    def build(item: str, text: str) -> dict[str, object]:
        return {"write": {f"{item}{setup.suffix}": text}, "result": result}

    script = {f"WRK-00{n}/build": [build(f"WRK-00{n}", setup.messy)] for n in (1, 2, 3)}
    script["WRK-001/build"].insert(0, build("WRK-001", setup.broken))
    project.script({"*/plan": [{"document": "PLAN.md"}], **script})
    return setup


def shell(project: Any, commands: str) -> str:
    bins = f"PATH={TOOLS}/node_modules/.bin:$PATH OUTSIDE={project.outside}; export OUTSIDE\n"
    done = subprocess.run(["sh", "-ec", bins + commands], cwd=project.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def work_on(project: Any, suffix: str) -> Any:
    """The operator's: a file with a staged and an unstaged change, and a new one; gives a look at them."""
    own, new = project.root / f"own{suffix}", project.root / f"new{suffix}"
    own.write_text("staged  = 1\n")
    project.git("add", own.name)
    own.write_text("mine  = 2\n")
    new.write_text("new  = 3\n")
    seen = ("diff", "--cached"), ("status", "--porcelain", own.name, new.name)
    return lambda: (own.read_text(), new.read_text(), *(project.git(*args) for args in seen))


@pytest.mark.parametrize("beside", [False, True], ids=["clean", "beside"])
@pytest.mark.parametrize("name", SETUPS)
def test_three_items_are_done_as_the_repository_wants_it(project: Any, name: str, beside: bool) -> None:
    """The first build leaves what a hook rejects; its retry reads the hook's words."""
    setup = prepare(project, name)
    start = project.git("rev-parse", "HEAD").strip()
    look = work_on(project, setup.suffix) if beside else project.status
    before = look()

    project.run("run", *["--allow-dirty"] * beside)

    prompt = (project.outside / "prompt-WRK-001-build-2.md").read_text()
    assert "the repository's pre-commit hook rejected the commit" in prompt
    assert setup.words in prompt
    assert ("Unstaged files detected" in prompt) == (beside and setup.suffix == ".py")  # none of ours
    assert project.items() == {}
    assert look() == before
    assert project.status().count("\n") == 2 * beside
    assert [project.git("show", f"HEAD:WRK-00{n}{setup.suffix}") for n in (1, 2, 3)] == [setup.mended] * 3
    assert project.git("stash", "list") == ""
    project.run("add", "One more", "--commit")
    form = "%G? %(trailers:key=Signed-off-by,valueonly,separator=%x2c) %s"
    made = project.git("log", f"--format={form}", f"{start}..").splitlines()
    if setup.suffix == ".js":
        shell(project, f"commitlint --from {start}")
        assert "N  fix(wrk-003): build: API limits, as agreed upon" in made
    if name == "signed":
        assert all(line.startswith("G Operator <operator@example.invalid> [") for line in made)


@pytest.mark.parametrize(
    ("name", "end"), [("husky", "kill"), ("lefthook", "time limit"), ("pre-commit", "kill"), ("pre-commit", "time limit")]
)
def test_the_operators_files_are_there_when_a_hook_has_not_come_to_its_end(project: Any, name: str, end: str) -> None:
    """A run is killed, or the hook ended; meanwhile pre-commit has them in its cache alone."""
    setup = prepare(project, name, "hook_timeout_seconds = 10" if end == "time limit" else "")
    look = work_on(project, setup.suffix)
    before = look()
    (project.outside / "slow").touch()

    process = project.start("run", "--target", "WRK-002", "--allow-dirty")
    project.announced()
    stashed = look()
    if end == "kill":
        process.kill()
        project.finish(process, -9)
        project.run("run", "--cap", "0", "--allow-dirty")
    else:
        project.finish(process, 4)
    assert name != "pre-commit" or stashed[0] == setup.mended
    assert look() == before
    assert not is_alive(project.outside / "slow")

    (project.outside / "slow").unlink()
    project.run("run", "--target", "WRK-002", "--allow-dirty", code=None)  # 3: the start has finished it
    assert look() == before
    assert project.status().count("\n") == 2
    assert "WRK-002" not in project.items()
