"""The grammar and the meaning of `--only`."""

from __future__ import annotations

import pytest

from backlog import BacklogError, Filter, Item, check_filters, matches, parse_filter


def item(item_id: str = "WRK-001", **fields: object) -> Item:
    return {"id": item_id, "title": "T", "status": "new", **fields}


def error_of(text: str) -> str:
    with pytest.raises(BacklogError) as caught:
        parse_filter(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("status=ready", Filter("status", ("ready",))),
        ("status=i", Filter("status", ("in_progress",))),
        ("IMPACT=h", Filter("impact", ("high",))),
        ("Risk=M", Filter("risk", ("medium",))),
        ("complexity=l", Filter("complexity", ("low",))),
        ("size=s", Filter("size", ("small",))),
        ("size=Large", Filter("size", ("large",))),
        ("tag=Auth", Filter("tag", ("Auth",))),
        ("tag=a=b,c=d", Filter("tag", ("a=b", "c=d"))),
        ("tag=a,A", Filter("tag", ("a", "A"))),
        ("pipeline_type=Feature", Filter("pipeline_type", ("Feature",))),
        ("impact=high, medium", Filter("impact", ("high", "medium"))),
        ("  size = small ", Filter("size", ("small",))),
        ("id=WRK-001,WRK-2", Filter("id", ("WRK-001", "WRK-2"))),
        ("origin=import", Filter("origin", ("import",))),
        ("priority=10,-1", Filter("priority", ("10", "-1"))),
        ("priority=+07", Filter("priority", ("7",))),
        ("status!=done,blocked", Filter("status", ("done", "blocked"), True)),
        ("tag != x", Filter("tag", ("x",), True)),
        ("tag=!x", Filter("tag", ("!x",))),
    ],
)
def test_parse(text: str, expected: Filter) -> None:
    assert parse_filter(text) == expected


@pytest.mark.parametrize("text", ["", "   ", "status", "status=", "=ready", "!=ready", "status!="])
def test_without_key_or_value_the_form_is_explained(text: str) -> None:
    assert error_of(text) == (f"Filter must be in format KEY=VALUE[,VALUE…] or KEY!=VALUE[,VALUE…], not '{text}'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo=bar", "Unknown filter field: foo. Supported: id, status, size, complexity, risk, impact, origin, tag, pipeline_type, priority"),
        ("key=val=ue", "Unknown filter field: key. Supported: id, status, size, complexity, risk, impact, origin, tag, pipeline_type, priority"),
        ("impact=hihg", "Invalid value 'hihg' for field 'impact': it must be one of low, medium, high, not \"hihg\" (did you mean \"high\"?)"),
        ("impact=high,bad,worse", "Invalid value 'bad' for field 'impact': it must be one of low, medium, high, not \"bad\""),
        ("priority=²", "Invalid value '²' for field 'priority': it must be a whole number, not \"²\""),
        ("tag=a,,b", "Empty value in comma-separated list: 'tag=a,,b'"),
        ("tag=a,", "Empty value in comma-separated list: 'tag=a,'"),
        ("impact=high,H", "Duplicate value 'high' in comma-separated list for field 'impact'"),
        ("tag=a,a", "Duplicate value 'a' in comma-separated list for field 'tag'"),
    ],
)
def test_refused(text: str, message: str) -> None:
    assert error_of(text) == message


@pytest.mark.parametrize("text", ["status=in_progress", "impact=high,medium", "tag=a=b,c", "id!=WRK-001", "priority=-3"])
def test_canonical_text_reads_the_same(text: str) -> None:
    assert str(parse_filter(text)) == text


@pytest.mark.parametrize(
    "flags", [[], ["impact=high", "size=small"], ["tag=a", "tag=b"], ["tag=a", "tag=a,b"], ["status=ready,new", "status!=new"]]
)
def test_flags_that_go_together(flags: list[str]) -> None:
    check_filters([parse_filter(flag) for flag in flags])


ONCE = "specified multiple times in separate --only flags; put the values in one: --only"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["impact=high", "impact=low"], f"Field 'impact' {ONCE} impact=value1,value2"),
        (["impact=h", "impact=high"], f"Field 'impact' {ONCE} impact=value1,value2"),
        (["id!=A-1", "size=small", "id!=A-2"], f"Field 'id' {ONCE} id!=value1,value2"),
        (["tag=a,b", "tag=a,b"], f"Field 'tag' {ONCE} tag=value1,value2"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], message: str) -> None:
    with pytest.raises(BacklogError) as caught:
        check_filters([parse_filter(flag) for flag in flags])
    assert str(caught.value) == message


ITEMS = [
    item("WRK-001", status="in_progress", impact="high", size="small", tags=["a", "c"]),
    item("WRK-002", status="blocked", impact="medium", size="small", tags=["b", "v1"]),
    item("WRK-003", impact="low", pipeline_type="feature", priority=5, origin="WRK-001/build"),
    item("WRK-004", origin="import", tags=["b", "c"], impact="high", size="large"),
]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "1234"),
        (["status=in_progress"], "1"),
        (["impact=high,medium"], "124"),
        (["impact=high,medium", "size=s"], "12"),
        (["complexity=high"], ""),
        (["tag=V1"], ""),
        (["tag=v1"], "2"),
        (["tag=a,b"], "124"),
        (["tag=a,b", "tag=c"], "14"),
        (["pipeline_type=feature"], "3"),
        (["status=new", "impact=high", "tag=c"], "4"),
        (["id=WRK-003,WRK-001"], "13"),
        (["origin=WRK-001"], "3"),
        (["origin=WRK-001/build"], "3"),
        (["origin=WRK-001/review"], ""),
        (["priority=5"], "3"),
        (["priority!=5"], "124"),
        (["tag!=b"], "13"),
        (["impact!=high,low"], "2"),
        (["size!=small"], "34"),
    ],
)
def test_matching(flags: list[str], expected: str) -> None:
    filters = [parse_filter(flag) for flag in flags]
    assert "".join(i["id"][-1] for i in ITEMS if matches(i, filters)) == expected
