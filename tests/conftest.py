"""Settings shared by all tests: hypothesis draws the same examples in every run, and few of them; one thread."""

from __future__ import annotations

import torch
from hypothesis import settings

settings.register_profile("fewstep", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("fewstep")

# Networks of this size lose more by sharing work than they win.
torch.set_num_threads(1)
