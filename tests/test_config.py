"""orchestrator.toml: what is read, what is refused and how that is said; preflight of config and items."""

import json
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from backlog import Backlog, Item
from orchestrator import (
    DOCUMENT_OUTPUTS,
    AgentSettings,
    Config,
    Phase,
    Pipeline,
    agent_settings,
    config_template,
    parse_config,
    pipeline_of,
)

BASE = Path("/project")
FEATURE = Pipeline(
    "feature",
    (Phase("research", outputs=DOCUMENT_OUTPUTS),),
    (
        Phase("prd", outputs=DOCUMENT_OUTPUTS),
        Phase("design", outputs=DOCUMENT_OUTPUTS),
        Phase("build", destructive=True),
        Phase("review", outputs=DOCUMENT_OUTPUTS),
    ),
)


def read(text: str) -> Config:
    return parse_config(text.encode(), "orchestrator.toml", BASE)


def complaints(text: str) -> list[str]:
    """The lines of the error that a config gets."""
    with pytest.raises(orchestrator.ConfigError) as caught:
        read(text)
    header, *lines = str(caught.value).split("\n")
    assert header == "orchestrator.toml: validation failed, correct this:"
    assert all(line.startswith("  - ") for line in lines)
    return [line[4:] for line in lines]


def one_pipeline(phases: str, pre_phases: str = "", more: str = "") -> str:
    return f"[pipelines.p]\npre_phases = [{pre_phases}]\nphases = [{phases}]\n{more}"


def test_d26_what_is_missing_means_the_defaults() -> None:
    assert read("") == Config(pipelines={"feature": FEATURE}, base=BASE, source="orchestrator.toml")
    assert orchestrator.default_config(BASE) == read("")._replace(source="built-in defaults")
    assert read('[guardrails]\nmax_risk = "high"') == read("")._replace(guardrails=orchestrator.Guardrails("medium", "medium", "high"))
    assert read("[pipelines]") == read('\ufeff[agent]\nmodel = " \\t"') == read("")
    own = Pipeline("p", (), (Phase("a", outputs=DOCUMENT_OUTPUTS), Phase("b")))
    assert read(one_pipeline('{ name = "a" }, { name = "b", outputs = [] }')).pipelines == {"p": own}
    phases = read(one_pipeline('{name="a"}, {name="b", is_destructive=true}, {name="c", destructive=true}')).pipelines["p"].phases
    assert [phase.destructive for phase in phases] == [False, True, True]


def test_every_key_is_read() -> None:
    execution: dict[str, Any] = {
        "phase_timeout_minutes": 1.5, "max_retries": 0, "retry_delay_seconds": 0, "circuit_breaker": 4, "default_phase_cap": 7,
        "max_run_minutes": 240, "max_cost_usd": 12.5, "max_wip": 3, "max_concurrent": 2, "idle_timeout_minutes": 0,
        "kill_grace_seconds": 1, "hook_timeout_seconds": 600, "on_usage_limit": "wait",
    }  # fmt: skip
    config = read(
        """
        project = { prefix = "HAMY", backlog_path = "dev/BACKLOG.yaml", protected_branches = ["main", "release"] }
        guardrails = { max_size = "small", max_complexity = "low", max_risk = "high" }
        notify = { command = ["notify-send", "done"] }
        [agent]
        cli = "command"
        model = " vendor/model-1.5 "
        command = ["my agent", "{prompt_file}", ""]
        args = ["--fast"]
        env = { TOKEN_FILE = "/x", EMPTY = "" }
        [pipelines.docs]
        pre_phases = [{ name = "look" }]
        phases = [
          { name = "write", workflows = ["a.md", "b.md"], agent = "codex", model = "m", timeout_minutes = 5, verify = [["make", "test"], ["true"]], outputs = ["docs/"] },
          { name = "publish", is_destructive = true, run = ["make", "all"], allow_empty = true },
        ]
        [execution]
        """
        + "\n".join(f"{key} = {json.dumps(value)}" for key, value in execution.items())
    )
    write = Phase(
        "write", workflows=("a.md", "b.md"), agent="codex", model="m", timeout_minutes=5.0,
        verify=(("make", "test"), ("true",)), outputs=("docs/",),
    )  # fmt: skip
    publish = Phase("publish", destructive=True, run=("make", "all"), allow_empty=True)
    env = {"TOKEN_FILE": "/x", "EMPTY": ""}
    assert config == Config(
        prefix="HAMY",
        backlog_path="dev/BACKLOG.yaml",
        protected_branches=("main", "release"),
        guardrails=orchestrator.Guardrails("small", "low", "high"),
        execution=orchestrator.Execution(**execution),
        agent=AgentSettings("command", "vendor/model-1.5", ("my agent", "{prompt_file}", ""), ("--fast",), env),
        notify=orchestrator.Notify(("notify-send", "done")),
        pipelines={"docs": Pipeline("docs", (Phase("look", outputs=DOCUMENT_OUTPUTS),), (write, publish))},
        base=BASE,
        source="orchestrator.toml",
    )


NO_TOML = {
    b"[project\n": "", b"x = \n": r"Invalid value \(at line 1, column 5\)", b"a = 1\na = 2": "", b"a = " + b"[" * 20_000: "", b"a = " + b"9" * 5_000: "",
    b'[project]\nprefix = "\xff"\n': r"it is not UTF-8 text \(byte 21\). Save it as UTF-8.",
}  # fmt: skip


def test_what_is_no_toml_is_refused_with_its_name() -> None:
    for data, says in NO_TOML.items():
        with pytest.raises(orchestrator.ConfigError, match=rf"^Failed to parse c: {says}"):
            parse_config(data, "c", BASE)


NUMBER = "must be a whole number from {} to 4294967295, not {}"
NAME = "must be at most 64 ASCII letters, digits, - and _, not"
PHASE = "pipelines.p.phases[0]"
WRONG = [
    ("[execution]\nmax_wip = 0", "execution.max_wip " + NUMBER.format(1, 0)),
    ("[execution]\nmax_retries = -1", "execution.max_retries " + NUMBER.format(0, -1)),
    ("[execution]\nmax_retries = 4294967296", "execution.max_retries " + NUMBER.format(0, 4294967296)),
    ("[execution]\nmax_wip = true", "execution.max_wip " + NUMBER.format(1, "true")),
    ("[execution]\nmax_wip = 0x" + "f" * 5000, "execution.max_wip " + NUMBER.format(1, "something far too large")),
    ("[execution]\nkill_grace_seconds = nan", "execution.kill_grace_seconds must be a number from 0 to 4294967295, not NaN"),
    ('[execution]\nmax_run_minutes = "2h"', 'execution.max_run_minutes must be a number from 0 to 4294967295, not "2h"'),
    ('[execution]\non_usage_limit = "stop"', 'execution.on_usage_limit must be one of halt, wait, not "stop"'),
    ('[guardrails]\nmax_risk = "hihg"', 'guardrails.max_risk must be one of low, medium, high, not "hihg" (did you mean "high"?)'),
    ("[project]\nprefix = 7", f"project.prefix {NAME} 7 (in quotes it is text: '7')"),
    ('[project]\nprefix = "A/B"', f'project.prefix {NAME} "A/B"'),
    ('[project]\nprotected_branches = "main"', 'project.protected_branches must be a list of texts such as ["a", "b"], not "main"'),
    ("project = 1", "project must be a mapping of keys to values, not 1"),
    ('[agent]\nenv = { T = "s3cret", N = 1, A = { B = "s3cret" } }', 'agent.env must be names with texts such as { CI = "1" }, not {"T": "…", "N": 1, "A": "{…}"}'),
    ('[agent]\nenv = { "A=B" = "1" }', 'agent.env must be names with texts such as { CI = "1" }, not {"A=B": "…"}'),
    ('[agent]\ncli = "Claude"', 'agent.cli must be one of claude, codex, opencode, gemini, command, demo, not "Claude" (did you mean "claude"?)'),
    ('[agent]\ncli = "command"', "agent.command is missing, but agent.cli asks for it: give the command"),
    *((f'[agent]\nmodel = "{m}"', f'agent.model must be letters, digits, . _ / - (no leading -), not "{m}"') for m in ("-m", "two words", "a;b", "ü")),
    ("[notify]\ncommand = []", 'notify.command must be a command such as ["make", "test"], not []'),
    ("[exection]", 'exection is no known key (did you mean "execution"?)'),
    ("[notify]\nxyz = 1", "notify.xyz is no known key"),
    ("[execution]\nmax_wpi = 2", 'execution.max_wpi is no known key (did you mean "max_wip"?)'),
    (one_pipeline("{name='a'}", more="fases = []"), 'pipelines.p.fases is no known key (did you mean "phases"?)'),
    (one_pipeline("{name='a', workflow='warn'}"), f'{PHASE}.workflow is no known key (did you mean "workflows"?)'),
    (one_pipeline(""), "pipelines.p needs at least one main phase in `phases`"),
    (one_pipeline("{name='a'}", "{name='a'}"), "pipelines.p has a duplicate phase name: a"),
    (one_pipeline("{name='a'}", "{name='b', is_destructive=true}"), "pipelines.p: the pre-phase b cannot be destructive; move it to `phases`"),
    (one_pipeline("{name='a', is_destructive=true, destructive=true}"), f"{PHASE}.destructive is another name for is_destructive: keep one of the two"),
    (one_pipeline("{}"), f"{PHASE}.name is missing: every phase needs one"),
    (one_pipeline("{name='triage'}"), f"{PHASE}.name must not be triage: the name is reserved for rating new items"),
    *((one_pipeline(f"{{name='{name}'}}"), f'{PHASE}.name {NAME} "{name}"') for name in ("a/b", "../x", "a b", "ä", "-x", "a.lock", "x" * 65)),
    (one_pipeline("{name='a', agent='command'}"), "agent.command is missing, but pipelines.p: the phase a asks for it: give the command"),
    (one_pipeline("{name='a', run=['make'], agent='demo'}"), f"{PHASE}.run replaces the agent: remove workflows, agent and model, or this"),
    (one_pipeline("{name='a', run=['']}"), f'{PHASE}.run must be a command such as ["make", "test"], not [""]'),
    (one_pipeline("{name='a', verify=['make']}"), f'{PHASE}.verify must be a list of commands such as [["make", "test"]], not ["make"]'),
    (one_pipeline("{name='a', outputs=['../x']}"), f'{PHASE}.outputs must be a list of paths below the project root such as ["docs/"], not ["../x"]'),
    (one_pipeline("{name='a', outputs=['/x']}"), f'{PHASE}.outputs must be a list of paths below the project root such as ["docs/"], not ["/x"]'),
    (one_pipeline("{name='a', is_destructive=true, outputs=['x']}"), f"{PHASE}.outputs means nothing for a destructive phase: remove it"),
]


def test_d15_d27_d45_what_is_wrong_is_told_with_its_place() -> None:
    for text, complaint in WRONG:
        assert complaints(text) == [complaint]
    assert complaints("pipelines.p.phases = 1")[0] == "pipelines.p.phases must be a list, not 1"
    several = "[execution]\nmax_wip = 0\nmax_concurrent = 0\n[nonsense]\n" + one_pipeline("")
    assert [line.split()[0] for line in complaints(several)] == ["execution.max_wip", "execution.max_concurrent", "pipelines.p", "nonsense"]


def test_d38_the_template_says_the_defaults_with_prefix_and_agent() -> None:
    assert read(config_template("WRK", "claude")) == read("")
    assert read(config_template("AB-c", "demo")) == read("")._replace(prefix="AB-c", agent=AgentSettings("demo"))
    assert read(config_template("WRK", "command")).agent.command == ("my-agent", "{prompt_file}", "{result_path}")
    # Whoever removes a `# ` in front of a key gets a valid file.
    lines = config_template("WRK", "claude").splitlines()
    keys = ("# max_", "# idle_", "# args", "# env", '# command = ["notify')
    config = read("\n".join(line[2:] if line.startswith(keys) else line for line in lines))
    assert (config.execution.max_run_minutes, config.execution.max_cost_usd) == (240, 20)
    assert config.notify.command == ("notify-send", "orchestrator")


def test_a_phase_is_found_with_its_pool_and_its_agent() -> None:
    config = read('[agent]\ncli = "codex"\nmodel = "m"\nargs = ["-x"]\nenv = { A = "1" }')
    assert pipeline_of(config, Item(id="A-1")) == pipeline_of(config, Item(id="A-1", pipeline_type="feature")) == FEATURE
    assert pipeline_of(config, Item(id="A-1", pipeline_type="other")) is None
    places = orchestrator.phase_places(FEATURE)
    assert (places["research"], places["build"]) == ((FEATURE.pre_phases[0], "pre", 0), (FEATURE.phases[2], "main", 3))
    usual = AgentSettings("codex", "m", (), ("-x",), {"A": "1"})
    assert agent_settings(config, Phase("a")) == agent_settings(config, Phase("a", agent="codex")) == usual
    assert agent_settings(config, Phase("a", model="n")) == usual._replace(model="n")
    other = AgentSettings("claude", env={"A": "1"})  # model and arguments belong to the other CLI
    assert agent_settings(config, Phase("a", agent="claude")) == other
    assert agent_settings(config, Phase("a", agent="claude", model="n")) == other._replace(model="n")


def test_timeouts_are_in_seconds_and_per_phase_and_agents_that_stream_have_an_idle_one() -> None:
    config = read("[execution]\nphase_timeout_minutes = 2")
    phases = Phase("a"), Phase("a", timeout_minutes=0), Phase("a", timeout_minutes=0.5)
    assert [orchestrator.phase_timeout_s(config, phase) for phase in phases] == [120, 0, 30]
    clis = "claude", "codex", "opencode", "gemini", "command", "demo"
    assert [orchestrator.idle_timeout_s(config, streams=orchestrator.PROFILES[cli].read is not None) for cli in clis] == [900] * 4 + [0, 0]
    for minutes in (0, 2):
        config = read(f"[execution]\nidle_timeout_minutes = {minutes}")
        assert [orchestrator.idle_timeout_s(config, streams=orchestrator.PROFILES[cli].read is not None) for cli in clis] == [60 * minutes] * 6


def test_d50_the_delay_doubles_up_to_five_minutes() -> None:
    config = read("")
    assert [orchestrator.retry_delay_s(config, n) for n in (1, 2, 3, 6, 7, 8, 4_000_000_000)] == [5, 10, 20, 160, 300, 300, 300]
    assert orchestrator.retry_delay_s(read("[execution]\nretry_delay_seconds = 0"), 4_000_000_000) == 0


def item(item_id: str, status: str = "new", **fields: object) -> Item:
    fields = {"title": item_id, "created": "2026-01-01T00:00:00+00:00", **fields}
    return {"id": item_id, "status": status, **fields}  # type: ignore[typeddict-item]


def problems(*items: Item, last: int = 0, config: Config | None = None) -> list[str]:
    backlog = Backlog({one["id"]: one for one in items}, last)
    found = orchestrator.preflight_items(config or read(""), backlog)
    assert all(problem.remedy for problem in found)
    return [problem.what for problem in found]


def test_workflow_files_must_exist_and_are_looked_up_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("x")
    text = one_pipeline("{name='a', workflows=['there.md', 'z.md']}, {name='b', workflows=['gone/x.md', 'z.md']}")
    config = parse_config(text.encode(), "my.toml", tmp_path)
    found = orchestrator.preflight_config(config, Path.exists)
    assert [problem.what for problem in found] == [
        f"my.toml: pipelines.p, phase b: Workflow file not found: {tmp_path}/gone/x.md",
        f"my.toml: pipelines.p, phase b: Workflow file not found: {tmp_path}/z.md",
    ]


@pytest.mark.parametrize(
    ("one", "what"),
    [
        (item("A-1", "in_progress", phase="build", phase_pool="main", pipeline_type="feature"), ""),
        (item("A-1", "in_progress"), ""),
        (item("A-1", "scoping", phase="research", phase_pool="pre"), ""),
        (item("A-1", "new", pipeline_type="nope", phase="nope"), ""),
        (item("A-1", "in_progress", pipeline_type="nope", phase="nope"), ""),
        (item("A-1", "in_progress", phase="biuld"), 'A-1 (in_progress) is in the unknown phase \'biuld\' (did you mean "build"?)'),
        (item("A-1", "in_progress", phase="research", phase_pool="main"), "A-1 (in_progress, main): research is a pre phase"),
        (item("A-1", "scoping", phase="prd", phase_pool="main"), "A-1 (scoping, main): prd is a main phase"),
        (item("A-1", "in_progress", phase="research"), "A-1 (in_progress): research is a pre phase"),
    ],
)
def test_items_that_do_not_fit_the_config(one: Item, what: str) -> None:
    assert problems(one) == ([f"BACKLOG.yaml: {what}"] if what else [])


def test_d49_a_dependency_that_never_was_is_reported() -> None:
    needs = ["WRK-001", "WRK-002", "WRK-009", "WKR-001", "x", "WRK-" + "9" * 5000]
    found = [problem[:72] for problem in problems(item("WRK-001"), item("WRK-004", dependencies=needs), last=5)]
    assert found == [
        'BACKLOG.yaml: WRK-004 depends on WRK-009, which does not exist (did you ', 'BACKLOG.yaml: WRK-004 depends on WKR-001, which does not exist (did you ',
        "BACKLOG.yaml: WRK-004 depends on x, which does not exist", "BACKLOG.yaml: WRK-004 depends on WRK-" + "9" * 35,
    ]
    assert problems(item("OLD-007", dependencies=["OLD-003"]), last=0) == []  # of a former prefix


def chain(edges: str, **status: str) -> list[Item]:
    """Items from edges such as "A>B": A-1 depends on B-1."""
    needs: dict[str, list[str]] = {}
    for left, _, right in (edge.partition(">") for edge in edges.split()):
        needs.setdefault(left, []).append(right + "-1")
        needs.setdefault(right, [])
    return [item(n + "-1", status.get(n, "new"), dependencies=d) for n, d in needs.items()]


@pytest.mark.parametrize(
    ("items", "cycles"),
    [
        (chain("A>A"), ["A-1 → A-1"]), (chain("A>B B>C C>B"), ["B-1 → C-1 → B-1"]), (chain("A>B B>A", B="done"), []),
        (chain("A>B B>A C>D D>C"), ["A-1 → B-1 → A-1", "C-1 → D-1 → C-1"]), (chain("A>B B>A", B="blocked"), ["A-1 → B-1 → A-1"]),
        (chain("A>B A>C B>D C>D D>D"), ["D-1 → D-1"]), (chain("A>B A>C B>D C>D"), []),
    ],
)  # fmt: skip
def test_circular_dependencies(items: list[Item], cycles: list[str]) -> None:
    assert problems(*items) == [f"BACKLOG.yaml: Circular dependency: {cycle}" for cycle in cycles]


def test_a_very_long_chain_is_walked_to_its_end() -> None:
    items = [item(f"A-{n}", dependencies=[f"A-{(n + 1) % 1500}"]) for n in range(1500)]
    [what] = problems(*items)
    assert what.startswith("BACKLOG.yaml: Circular dependency: A-0 → A-1 → A-2 → ")
    assert what.endswith(" → A-1499 → A-0")
