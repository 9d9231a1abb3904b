"""Files of format 1 in today's names."""

import pytest

from fewstep.utils import old_names
from fewstep.utils.errors import CheckpointError
from fewstep.utils.serialization import in_this_format


def test_types_fields_and_values_are_translated_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field may move into a part of its own; what has no old name stays."""
    monkeypatch.setitem(old_names.TYPES, "Old", "New")
    monkeypatch.setitem(old_names.FIELDS, "New", {"diagonal": "pairs.share", "times": "pairs.times", "kind": "sort"})
    monkeypatch.setitem(old_names.VALUES, ("New", "sort"), {"a": "b"})
    old = {"type": "Old", "diagonal": 0.5, "times": {"type": "T", "a": 1}, "kind": "a", "more": [{"type": "Old"}]}
    new = {
        "type": "New",
        "pairs": {"share": 0.5, "times": {"type": "T", "a": 1}},
        "sort": "b",
        "more": [{"type": "New"}],
    }
    assert old_names.translated({"run": old, "n": None}) == {"run": new, "n": None}


def test_what_lay_elsewhere_in_a_file_is_moved() -> None:
    """From the top of the file; the record that was read stays, and a damaged place is left to the reader."""
    old = {"flow_map": {"type": "FlowMapConfig", "class_names": ["a"], "shape": [2]}, "step_times": []}
    new = {
        "flow_map": {"type": "FlowMapConfig", "shape": [2]},
        "pipeline": {"class_names": ["a"], "step_times": []},
    }
    assert old_names.translated_file(old) == new
    assert "class_names" in old["flow_map"]
    assert old_names.translated_file({"step_times": [], "pipeline": [1]}) == {"pipeline": [1]}
    assert old_names.translated_file({"run": {}, "data": {}}) == {"run": {}, "data": {}}


def test_a_file_of_format_1_that_cannot_be_translated_is_damaged() -> None:
    """Where a part should lie there is a number, or the nesting has no end: one line that names the file."""
    run: dict[str, object] = {"type": "ISD", "pairs": 5, "times": {"type": "BetaTimes"}}
    deep: dict[str, object] = {}
    for _ in range(10_000):
        deep = {"a": deep}
    for record in (run, deep):
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            in_this_format({"run": record}, "config.json")
