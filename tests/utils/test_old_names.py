"""Files of format 1 in today's names."""

from __future__ import annotations

import pytest

from fewstep.utils import old_names


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
