"""Sizes and durations: what people write, and what they read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.errors import UserError
from modelfsd.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64MiB", 64 << 20),
        ("10G", 10 << 30),
        ("10g", 10 << 30),
        ("10GB", 10**10),
        ("1.5TiB", 3 << 39),
        (" 2 KiB ", 2048),
        ("1kB", 1000),
        ("7 B", 7),
    ],
)
def test_a_size_means_what_its_unit_says(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "1e9", "10 apples", "1.0001", "9999P", "1_000"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("30", 30), ("500ms", 0.5), ("1.5h", 5400), ("10m", 600), ("2d", 172_800)],
)
def test_a_duration_means_what_its_unit_says(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1s", "3 fortnights", "inf", "nan", "101y", "99999w"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_duration(text)


@given(st.integers(min_value=0, max_value=1 << 62))
def test_a_formatted_size_reads_back_within_half_a_percent(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert len(text.split()[0]) <= 4
    number, unit = text.split()
    read = float(number) * parse_size(f"1{unit}")
    assert read == pytest.approx(size_bytes, rel=0.0051)


@given(st.floats(min_value=0, max_value=1e9))
def test_a_formatted_duration_reads_back_to_its_second_unit(seconds: float) -> None:
    parts = format_duration(seconds).split()
    assert 1 <= len(parts) <= 2
    read = sum(parse_duration(part) for part in parts)
    assert read == pytest.approx(seconds, rel=0.042, abs=0.51)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (4 << 20, "4.00 MiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_sizes_are_shown_with_three_digits(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text
