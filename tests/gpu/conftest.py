"""What a GPU alone can show. FEWSTEP_GPU_TESTS=cpu runs the same on the CPU, but for what only a GPU has."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins: products in one order


@pytest.fixture
def device() -> Iterator[torch.device]:
    if os.environ.get("FEWSTEP_GPU_TESTS") == "cpu":
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    yield torch.device("cuda")


@pytest.fixture
def in_one_order() -> Iterator[None]:
    """Sums in one order: kernels of attention else add gradients as they come."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
