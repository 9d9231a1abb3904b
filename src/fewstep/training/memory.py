"""The device that a process trains on, and the most memory that it has taken so far, in MiB."""

import sys

import torch

_MIB = 2**20


def peak_memory(device: torch.device) -> float:
    """Of a GPU what PyTorch has allocated there, else what the process has had resident; 0 where no system says it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


def memory_words(device: torch.device) -> str:
    """The peak in words; empty where no system says it."""
    kind = "allocated on the GPU" if device.type == "cuda" else "resident"
    mib = peak_memory(device)
    return f"peak memory {mib:,.0f} MiB ({kind})" if mib else ""


def device_name(device: torch.device) -> str:
    """CPU, or what the GPU calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
