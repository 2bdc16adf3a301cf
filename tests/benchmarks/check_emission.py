"""Check that other YAML readers take what backlog.py writes for exactly what was meant.

    python tests/benchmarks/check_emission.py [--count 20000] [--seed 1] [--node-modules DIR]

Random texts and all known traps are written in every position that the backlog knows: as keys, as
values, as list elements, in an item and below it, and as the new value of an edited line, where the
old style (quotes, flow list, comment behind it) is kept. Each document is then read by PyYAML (C
and Python), ruamel.yaml (1.2 and 1.1) and the npm package `yaml` (1.2 and 1.1, `node` and
DIR/yaml needed). A reader that is not installed is named and left out. Exit code 1: one of them
reads something else.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from backlog import Document, parse_yaml, render_yaml  # noqa: E402

Readers = dict[str, Callable[[list[str]], list[object]]]

SIGNS = "ab01 :#-?,[]{}'\"|>%@`&*!~=<.+_eExo\n\t\\/é\xa0\u3000\u2028\x85\x07😀Yn"
WORDS = [
    "y", "n", "yes", "no", "on", "off", "true", "false", "null", "~", "=", "<<", "---", "...", "-", "?", ":",
    "0", "-0", "+1", "007", "010", "08", "0x1F", "0X1f", "0o7", "0b11", "1_000", "1__0", "-_1", "1.", ".5", "1e3",
    "1E+3", "61e9540", "1234567", "e123456", "0192117", "0_B0", "++1", "0b+1", "0o+1", "e3", "E9", "e9", ".", "+e1",
    "._5", ".inf", "-.INF", ".nan", "1:30", "12:30:45", "-1:30", "190:20:30.15", "2026-02-13", "2026-2-3",
    "2026-13-45", "2026-02-13T01:02:03.123456789Z", "2026-02-13 01:02:03 +1", "a: b", "a:", ": a", "a #b", "#a",
    "- a", "? a", "a\n", "a\n\n", " a\nb", "a \nb", "a\n b\n", "\ta", "a\t\nb", "'", '"', "''", "it's", 'a "b"',
    "\\", "\\n", "\xa0a", "a\u3000", "", " ", "\n", "[a", "{a}", "!a", "&a", "*a", "%a", "@a", "`a", "|", ">", ",",
]  # fmt: skip
TRAPS = [form for word in WORDS for form in dict.fromkeys((word, word.capitalize(), word.upper()))]
STYLES = ["plain", "'single'", '"double"', "[flow]", "|-\n    literal", "plain  # why", "'x'  # why"]


def documents(texts: list[str]) -> Iterator[tuple[str, object]]:
    """Texts in every position: documents, and what they mean."""
    value: dict[str, object] = {
        "values": {f"k{number}": text for number, text in enumerate(texts)},
        "keys": dict.fromkeys(texts, "x"),
        "list": texts,
        "items": [{"id": text, "tags": [text], "in": {"deep": [[text], {"k": text}]}} for text in texts],
    }
    yield render_yaml(value), value
    lines = [f"- a: {STYLES[number % len(STYLES)]}\n  b:\n  - x" for number in range(len(texts))]
    document = Document.parse(("items:\n" + "\n".join(lines) + "\n").encode(), "edited")
    for number, text in enumerate(texts):
        new: object = [text, "x"] if STYLES[number % len(STYLES)] == "[flow]" else text
        document = document.with_item(number, {"a": new, "b": ["x", text]})
    yield document.to_bytes().decode(), {"items": [*document.items]}


def own_reader() -> Readers:
    return {"backlog.py": lambda texts: [parse_yaml(text.encode()) for text in texts]}


def pyyaml_readers() -> Readers:
    try:
        import yaml
    except ImportError:
        print("PyYAML is not installed: left out")
        return {}
    loaders = {"PyYAML": yaml.SafeLoader, "PyYAML (C)": getattr(yaml, "CSafeLoader", None)}
    return {
        name: lambda texts, loader=loader: [yaml.load(text, loader) for text in texts]
        for name, loader in loaders.items()
        if loader
    }


def ruamel_readers() -> Readers:
    try:
        from ruamel.yaml import YAML
    except ImportError:
        print("ruamel.yaml is not installed: left out")
        return {}

    def read(texts: list[str], version: tuple[int, int]) -> list[object]:
        reader = YAML(typ="safe", pure=True)
        reader.version = version
        return [reader.load(text) for text in texts]

    return {
        f"ruamel.yaml, YAML 1.{minor}": lambda texts, minor=minor: read(texts, (1, minor))
        for minor in (2, 1)
    }


NODE = """
const {parse} = require(process.argv[1]), version = process.argv[2]
const texts = JSON.parse(require('fs').readFileSync(0))
process.stdout.write(JSON.stringify(texts.map(text => parse(text, {version}))))
"""


def npm_readers(modules: Path) -> Readers:
    package = (modules / "yaml").resolve()
    if not shutil.which("node") or not package.is_dir():
        print(f"npm yaml is not installed (node, and {package}): left out")
        return {}

    def read(texts: list[str], version: str) -> list[object]:
        argv = ["node", "-e", NODE, str(package), version]
        sent = json.dumps(texts).encode()
        found: list[object] = json.loads(subprocess.run(argv, input=sent, capture_output=True, check=True).stdout)
        return found

    return {
        f"npm yaml, YAML {version}": lambda texts, version=version: read(texts, version)
        for version in ("1.2", "1.1")
    }


def differences(name: str, found: object, meant: object, where: str = "") -> list[str]:
    """The places at which two values differ."""
    if isinstance(found, dict) and isinstance(meant, dict) and found.keys() == meant.keys():
        pairs = [(f"{where}.{key}", found[key], meant[key]) for key in meant]
    elif isinstance(found, list) and isinstance(meant, list) and len(found) == len(meant):
        pairs = [(f"{where}[{n}]", *pair) for n, pair in enumerate(zip(found, meant, strict=True))]
    else:
        same = type(found) is type(meant) and found == meant
        return [] if same else [f"{name}: {where[-60:]!r}: {found!r:.200} instead of {meant!r:.200}"]
    return [line for at, one, other in pairs for line in differences(name, one, other, at)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="random texts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--node-modules", type=Path, default=ROOT / "node_modules")
    args = parser.parse_args()
    readers = own_reader() | pyyaml_readers() | ruamel_readers() | npm_readers(args.node_modules)
    rng = random.Random(args.seed)
    texts = ["".join(rng.choices(SIGNS, k=rng.randint(0, 8))) for _ in range(args.count)] + TRAPS
    blocks = [texts[start : start + 25] for start in range(0, len(texts), 25)]
    pairs = [pair for block in blocks for pair in documents(block)]
    failed = False
    for name, read in readers.items():
        wrong = []
        try:
            for (_, meant), found in zip(pairs, read([text for text, _ in pairs]), strict=True):
                wrong += differences(name, found, meant)
        except Exception as error:  # whatever a reader raises, it does not read our document
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:400]}")
        failed = failed or bool(wrong)
        print(f"{name}: {len(texts)} texts, {len(wrong)} read differently", *wrong[:5], sep="\n  ")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
