"""Digests of settings, by which stored cells of a study are known."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fewstep.utils.old_names import VALUES
from fewstep.utils.serialization import to_json


def digest(*parts: Any) -> str:
    """Eight hex digits of dataclasses and plain values. A field that came later counts only where it is not at what its
    absence meant, and a part counts by the word that it was first called by, so that digests of older settings stay.
    """
    record = json.dumps([_in_words(to_json(part, terse=True)) for part in parts])
    return hashlib.blake2b(record.encode(), digest_size=4).hexdigest()


_WORDS = {new["type"]: old for words in VALUES.values() for old, new in words.items() if isinstance(new, dict)}


def _in_words(stored: Any) -> Any:
    """JSON values with the parts that format 1 stored as a word as that word."""
    if isinstance(stored, list):
        return [_in_words(item) for item in stored]
    if not isinstance(stored, dict):
        return stored
    word = _WORDS.get(stored.get("type", ""))
    return {key: _in_words(value) for key, value in stored.items()} if word is None else word
