"""Settings shared by all tests: hypothesis draws the same examples in every run, and few of them."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fewstep", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("fewstep")
