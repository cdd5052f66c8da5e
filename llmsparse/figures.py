"""How figures are written: with their error, as shares, as bytes."""

import math


def with_error(value: float | None, error: float | None, scale: float = 1.0) -> str:
    """``30.1 ± 1.2``: two digits of the error, and the value as far."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if not error or error < 0 or not math.isfinite(error) or abs(value * scale) >= 1e7:
        return plain(value * scale)
    digits = min(max(1 - math.floor(math.log10(float(f"{error * scale:.1e}"))), 0), 8)
    return f"{value * scale:.{digits}f} ± {error * scale:.{digits}f}"


def plain(value: float | None) -> str:
    """Four digits, and no exponent where whole digits are short enough."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def count(number: int) -> str:
    """``0``, ``512``, ``98k``, ``1.05M``: three digits."""
    for power, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= power:
            return f"{number / power:.3g}{unit}"
    return str(number)


def percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %".replace("-", "−")


def byte_size(count: float | None) -> str:
    """``12.5 MiB``; nothing for None."""
    if count is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def duration(seconds: float | None) -> str:
    """``4.2 s``, ``3 min``, ``2 h 13 min``; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
