"""What GPUs can do at most: FLOP/s of dense matrix products, as their vendor states them, without sparsity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """FLOP/s in bf16 with sums in float32; in float32 without rounding, and with products rounded to TF32.

    tf32: 0 where it is not known, and where float32 stays exact.
    """

    bf16: float
    float32: float
    tf32: float = 0.0

    def seconds(self, half: float, wide: float, tf32: bool = False) -> float:
        """Of so many FLOPs in bf16, and so many in float32, at the peak."""
        return half / self.bf16 + wide / (self.tf32 if tf32 and self.tf32 else self.float32)


def _tera(bf16: float, float32: float, tf32: float) -> Peak:
    return Peak(bf16 * 1e12, float32 * 1e12, tf32 * 1e12)


PEAKS = {
    "B200": _tera(2250, 75, 1125),
    "H200": _tera(989, 67, 494),
    "H100 PCIe": _tera(756, 51, 378),
    "H100 NVL": _tera(835, 60, 417),
    "H100": _tera(989, 67, 494),
    "A100": _tera(312, 19.5, 156),
    "A10G": _tera(70, 31.5, 35),
    "A10": _tera(125, 31.2, 62.5),
    "L40S": _tera(362, 91.6, 183),
    "L4": _tera(121, 30.3, 60),
    "RTX 4090": _tera(165, 82.6, 82.6),
    "RTX 3090": _tera(71, 35.6, 35.6),
}
"""By a part of the device's name; the first that fits counts. H100, H200 and B200 alone are the SXM modules."""


def peak_of(device: str) -> Peak | None:
    """Of a device by the name that it gives itself, as "NVIDIA H100 80GB HBM3"; None for one that is not known."""
    words = f" {device.replace('-', ' ')} "
    return next((peak for name, peak in PEAKS.items() if f" {name} " in words), None)
