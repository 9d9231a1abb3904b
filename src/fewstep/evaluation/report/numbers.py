"""Numbers as a reader wants them: few digits, true minus signs, nothing where there is no value."""

import json
import math
from collections.abc import Mapping

from fewstep.utils.files import LARGEST

NOTHING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(row: Mapping[str, object], key: str) -> float | None:
    """The number under `key`; None when it is absent, no number, NaN, or too large to be drawn."""
    value = row.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    return None


def number(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits: 1,234, 12.3, 0.0123, 1.2×10⁻⁵; a dash for None."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if not -4 < power < 6:
        return f"{mantissa}×10{str(power).translate(_SUPERSCRIPTS)}".replace("-", "−")
    return f"{float(f'{value:.{digits - 1}e}'):,.{max(0, digits - 1 - power)}f}".replace("-", "−")


def count(value: float | None) -> str:
    """A whole number, thousands apart; a dash for None."""
    return NOTHING if value is None else f"{value:,.0f}"


def with_error(value: float | None, error: float | None) -> str:
    """`value ± error`, both to the second significant digit of the error."""
    if value is None or error is None or error <= 0:
        return number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 6:
        return f"{number(value)} ± {number(error, 2)}"
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}".replace("-", "−")


def setting(value: object) -> str:
    """A setting: text as it is, anything else as JSON."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def tick(value: float, position: float | None = None) -> str:
    """A label of an axis: 0.5, 20, 5k, 1.2M, 10⁻⁴. `position` is what matplotlib passes besides."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1e12:
            return f"{value / unit:.4g}{letter}"
    if 1e-3 <= size < 1e3:
        return f"{value:.4g}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}×{power}"
