"""Digests of settings, by which stored cells of a study are known."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fewstep.utils.serialization import to_json


def digest(*parts: Any) -> str:
    """Eight hex digits of dataclasses and plain values. A field that came later counts only where it is not at what its
    absence meant, so that digests of older settings stay.
    """
    record = json.dumps([to_json(part, terse=True) for part in parts])
    return hashlib.blake2b(record.encode(), digest_size=4).hexdigest()
