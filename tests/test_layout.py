"""The shape of the code: what its docstring promises about order, purity and dependencies."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
MODULES = ("gitutil", "backlog", "orchestrator")  # imports point to the left only
TEXTS = {name: (HERE / f"{name}.py").read_text() for name in MODULES}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
BANNER = re.compile(r"^# ==== (\d+)\. (.+?) =+$", re.M)


def banners(name: str) -> list[tuple[int, str, int]]:
    """Number, title and line of each chapter."""
    text = TEXTS[name]
    return [(int(m[1]), m[2], text.count("\n", 0, m.start()) + 1) for m in BANNER.finditer(text)]


@pytest.mark.parametrize("name", ["backlog", "orchestrator"])
def test_the_reading_order_of_the_docstring_is_that_of_the_banners(name: str) -> None:
    docstring = ast.get_docstring(TREES[name]) or ""
    order = docstring.partition("Reading order")[2]
    listed = [(int(number), title) for number, title in re.findall(r"(\d+)\. ([^·\n]+?) *(?:·|$)", order, re.M)]
    assert listed == [(number, title) for number, title, _ in banners(name)]
    assert [number for number, _ in listed] == list(range(1, len(listed) + 1))


@pytest.mark.parametrize("name", MODULES)
def test_chapters_are_numbered_and_functions_fit_a_screen(name: str) -> None:
    """Imports are the standard library and our modules to the left; no exception is swallowed without a name."""
    assert [number for number, _, _ in banners(name)] == list(range(1, len(banners(name)) + 1))
    assert {len(match[0]) for match in BANNER.finditer(TEXTS[name])} <= {100}
    allowed = sys.stdlib_module_names | set(MODULES[: MODULES.index(name)])
    if name == "backlog":
        allowed = allowed - {"gitutil"}
    bad = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            bad += [alias.name for alias in node.names if alias.name.partition(".")[0] not in allowed]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            bad += [node.module] * ((node.module or "").partition(".")[0] not in allowed)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            bad += [f"{node.name}: {lines} lines"] * (lines > 60 and node.name != "build_parser")
        elif isinstance(node, ast.ExceptHandler) and all(isinstance(step, ast.Pass) for step in node.body):
            named = node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException")
            bad += [f"line {node.lineno}"] * (not named)
    assert bad == []


def test_a_start_loads_nothing_that_only_a_run_needs() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import orchestrator; print(*sys.modules)"
    argv = [sys.executable, "-E", "-S", "-c", code, str(HERE)]
    loaded = set(subprocess.run(argv, capture_output=True, check=True, text=True, timeout=60).stdout.split())
    assert loaded & {"asyncio", "concurrent.futures", "logging", "subprocess", "tomllib", "unicodedata"} == set()


PURE = ("Config", "Decisions (pure)", "Texts (pure)")
PURE_IMPORTS = {"difflib", "fnmatch", "functools", "heapq", "itertools", "json", "math", "re", "shlex", "string", "textwrap", "tomllib", "unicodedata"}
IMPURE_MODULES = {"asyncio", "os", "signal", "subprocess", "sys", "time"}
IMPURE_NAMES = {"Repo", "Store", "input", "log", "open", "print", "utc_now"}
IMPURE_METHODS = {
    "exists", "glob", "is_dir", "is_file", "iterdir", "lstat", "mkdir", "now", "open", "read_bytes", "read_text", "rename",
    "resolve", "rglob", "stat", "touch", "today", "unlink", "utcnow", "write_bytes", "write_text",
}


def test_the_pure_chapters_do_nothing_but_compute() -> None:
    chapters = banners("orchestrator")
    ends = [line for _, _, line in chapters[1:]] + [sys.maxsize]
    ranges = [(line, end) for (_, title, line), end in zip(chapters, ends, strict=True) if title in PURE]
    assert len(ranges) == len(PURE)
    bad = []
    for node in ast.walk(TREES["orchestrator"]):
        line = getattr(node, "lineno", 0)
        if not any(start < line < end for start, end in ranges):
            continue
        if isinstance(node, (ast.Await, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Global)):
            bad.append(f"{line}: {type(node).__name__}")
        elif isinstance(node, ast.Import):
            bad += [f"{line}: import {a.name}" for a in node.names if a.name not in PURE_IMPORTS]
        elif isinstance(node, ast.ImportFrom) and node.module not in PURE_IMPORTS:
            bad.append(f"{line}: from {node.module}")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in IMPURE_NAMES:
            bad.append(f"{line}: {node.id}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in IMPURE_MODULES:
            bad.append(f"{line}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in IMPURE_METHODS:
            bad.append(f"{line}: .{node.func.attr}()")
    assert bad == []
