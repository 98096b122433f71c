"""Sizes and durations as people write them, and back.

Sizes: a number and a unit. K, M, G, T, P and KiB ... PiB are powers of 1024, as in `dd`, LVM and
the kernel's own options; kB, MB, GB, TB, PB are powers of 1000, as on a disk's label. Units are
not case-sensitive. Durations: a number and ms, s, m, h, d or w; a bare number means seconds.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from modelfs.errors import UserError

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_LETTERS = "kmgtp"
_SIZE_UNITS = {"": 1, "b": 1} | {
    letter + ending: base ** (power + 1)
    for power, letter in enumerate(_LETTERS)
    for ending, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
_DURATION_UNITS = {
    "": Fraction(1),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86_400),
    "w": Fraction(604_800),
}
_SIZE_BYTES_MAX = 1 << 63
_DURATION_SECONDS_MAX = 100 * 365 * 86_400


def parse_size(text: str) -> int:
    """Bytes. Raises `UserError` for what is not a size, is a fraction of a byte, or is absurd."""
    match = _NUMBER.fullmatch(text.strip())
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UserError(f"{text!r} is not a size: write for example 64MiB, 10G or 1.5TiB")
    size = Fraction(match[1]) * unit
    if size.denominator != 1:
        raise UserError(f"{text!r} is not a whole number of bytes")
    if size >= _SIZE_BYTES_MAX:
        raise UserError(f"{text!r} is more than any file system holds (8 EiB)")
    return int(size)


def parse_duration(text: str) -> float:
    """Seconds. Raises `UserError` for what is not a duration, or is longer than a century."""
    match = _NUMBER.fullmatch(text.strip())
    unit = _DURATION_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UserError(f"{text!r} is not a duration: write for example 500ms, 30s, 10m or 1h")
    seconds = Fraction(match[1]) * unit
    if seconds > _DURATION_SECONDS_MAX:
        raise UserError(f"{text!r} is longer than a century")
    return float(seconds)


def format_size(size_bytes: int) -> str:
    """Three significant digits in powers of 1024: `0 B`, `1.50 KiB`, `12.3 GiB`, `1023 MiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    value, unit = float(size_bytes), ""
    for letter in _LETTERS.upper():
        if value < 1023.5:
            break
        value, unit = value / 1024, f"{letter}iB"
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{digits}f} {unit}"


def format_duration(seconds: float) -> str:
    """The two largest units that matter: `0.25s`, `12s`, `3m 5s`, `2d 4h`."""
    if seconds < 10:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    whole = round(seconds)
    parts = []
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, whole = divmod(whole, length)
        if count:
            parts.append(f"{count}{unit}")
        elif parts:
            break  # `1d 5s` would promise a precision that nobody asked for
        if len(parts) == 2:
            break
    return " ".join(parts)
