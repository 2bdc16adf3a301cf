"""The grammar and the meaning of `--only`."""

import pytest

from backlog import BacklogError, Filter, Item, check_filters, matches, parse_filter


def item(item_id: str = "WRK-001", **fields: object) -> Item:
    return {"id": item_id, "title": "T", "status": "new", **fields}


PARSED = {
    "status=i": ("status", "in_progress"), "IMPACT=h": ("impact", "high"), "Risk=M": ("risk", "medium"), "complexity=l": ("complexity", "low"),
    "size=Large": ("size", "large"), "  size = small ": ("size", "small"), "tag=Auth": ("tag", "Auth"), "tag=a=b,c=d": ("tag", "a=b", "c=d"),
    "tag=a,A": ("tag", "a", "A"), "tag=!x": ("tag", "!x"), "pipeline_type=Feature": ("pipeline_type", "Feature"),
    "impact=high, medium": ("impact", "high", "medium"), "id=WRK-001,WRK-2": ("id", "WRK-001", "WRK-2"), "priority=+07": ("priority", "7"),
    "status!=done,blocked": ("status!", "done", "blocked"), "tag != x": ("tag!", "x"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), PARSED.items())
def test_parse(text: str, expected: tuple[str, ...]) -> None:
    key, *values = expected
    assert parse_filter(text) == Filter(key.rstrip("!"), tuple(values), key.endswith("!"))


FORM = "Filter must be in format KEY=VALUE[,VALUE…] or KEY!=VALUE[,VALUE…], not '{}'"
UNKNOWN = "Unknown filter field: {}. Supported: id, status, size, complexity, risk, impact, origin, tag, pipeline_type, priority"
LEVEL = "Invalid value '{0}' for field 'impact': it must be one of low, medium, high, not \"{0}\""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, FORM.format(text)) for text in ("", "   ", "status", "status=", "=ready", "!=ready", "status!=")),
        ("foo=bar", UNKNOWN.format("foo")),
        ("key=val=ue", UNKNOWN.format("key")),
        ("impact=hihg", LEVEL.format("hihg") + ' (did you mean "high"?)'),
        ("impact=high,bad,worse", LEVEL.format("bad")),
        ("priority=²", "Invalid value '²' for field 'priority': it must be a whole number, not \"²\""),
        ("tag=a,,b", "Empty value in comma-separated list: 'tag=a,,b'"),
        ("tag=a,", "Empty value in comma-separated list: 'tag=a,'"),
        ("impact=high,H", "Duplicate value 'high' in comma-separated list for field 'impact'"),
        ("tag=a,a", "Duplicate value 'a' in comma-separated list for field 'tag'"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(BacklogError) as caught:
        parse_filter(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("flags", "twice"),
    [
        (["impact=high", "size=small", "id!=WRK-001", "priority=-3"], ""),
        (["tag=a", "tag=a,b", "tag=a=b,c"], ""),
        (["status=ready,new", "status!=new"], ""),
        (["impact=high", "impact=low"], "impact="),
        (["impact=high", "impact=high"], "impact="),
        (["id!=A-1", "size=small", "id!=A-2"], "id!="),
        (["tag=a,b", "tag=a,b"], "tag="),
    ],
)
def test_flags_that_go_together_and_their_canonical_text(flags: list[str], twice: str) -> None:
    filters = [parse_filter(flag) for flag in flags]
    assert [str(one) for one in filters] == flags
    said = ""
    try:
        check_filters(filters)
    except BacklogError as error:
        said = str(error)
    once = "specified multiple times in separate --only flags; put the values in one: --only"
    assert said == (f"Field '{twice.strip('!=')}' {once} {twice}value1,value2" if twice else "")


ITEMS = [
    item("WRK-001", status="in_progress", impact="high", size="small", tags=["a", "c"]),
    item("WRK-002", status="blocked", impact="medium", size="small", tags=["b", "v1"]),
    item("WRK-003", impact="low", pipeline_type="feature", priority=5, origin="WRK-001/build"),
    item("WRK-004", origin="import", tags=["b", "c"], impact="high", size="large"),
]


MATCHING = {
    "": "1234", "impact=high,medium size=s": "12", "complexity=high": "", "tag=V1": "", "tag=v1": "2", "tag=a,b": "124", "tag=a,b tag=c": "14",
    "pipeline_type=feature": "3", "status=new impact=high tag=c": "4", "id=WRK-003,WRK-001": "13", "origin=WRK-001": "3",
    "origin=WRK-001/build": "3", "origin=WRK-001/review": "", "priority!=5": "124", "tag!=b": "13", "impact!=high,low": "2",
}  # fmt: skip


@pytest.mark.parametrize(("flags", "expected"), MATCHING.items())
def test_matching(flags: str, expected: str) -> None:
    filters = [parse_filter(flag) for flag in flags.split()]
    assert "".join(i["id"][-1] for i in ITEMS if matches(i, filters)) == expected
