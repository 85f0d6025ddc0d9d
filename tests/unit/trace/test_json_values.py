"""JSON texts of a run hold what a pass writes, or the entry is named."""

import pytest

from geomprobe.errors import RunError
from geomprobe.trace.json_values import MANIFEST, manifest_of_text, require_form

FORM = {"count": range(10), "of": [str], "kind": {"a", "b"}, "either": (str, [str]), "in": {"x": bool}}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"count": 0},
        {"count": None},
        {"of": []},
        {"of": ["x"], "kind": "a"},
        {"either": "x"},
        {"either": ["x"]},
        {"y": 1},
    ],
)
def test_what_fits_is_given_back(value):
    assert require_form(value, FORM, "it") is value


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        ([], "it"),
        ({"count": -1}, "it.count"),
        ({"count": 10}, "it.count"),
        ({"count": 1.0}, "it.count"),
        ({"count": float("nan")}, "it.count"),
        ({"count": True}, "it.count"),
        ({"of": "x"}, "it.of"),
        ({"of": ["x", 1]}, r"it.of\[1\]"),
        ({"kind": "c"}, "it.kind"),
        ({"kind": ["a"]}, "it.kind"),
        ({"either": [1]}, "it.either"),
        ({"in": {"x": 1}}, "it.in.x"),
    ],
)
def test_what_does_not_fit_is_named(value, entry):
    with pytest.raises(RunError, match=f"^{entry} is damaged: it is "):
        require_form(value, FORM, "it")


def test_a_long_value_is_cut_and_a_deep_one_refused():
    with pytest.raises(RunError, match=r"x{50,56}\.\.\."):
        require_form("x" * 1000, int, "it")
    deep: list = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(RunError, match="nested more than 32 deep"):
        require_form(deep, list, "it")


@pytest.mark.parametrize(
    "text", [None, 7, "", "{", "[" * 100_000, "[]", "7", '{"seed": "x"}', '{"measure": {"every": 0}}']
)
def test_a_text_that_is_no_manifest_is_refused(text):
    with pytest.raises(RunError, match="damaged"):
        manifest_of_text(text)


def test_each_entry_of_a_manifest_may_be_missing():
    assert manifest_of_text("{}") == {}
    for name in MANIFEST:
        assert manifest_of_text(f'{{"{name}": null}}') == {name: None}
