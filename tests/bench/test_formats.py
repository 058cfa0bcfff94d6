"""Numbers as text, and text as short text."""

import pytest

from kdedge_bench.formats import confidence, count, interval, milliseconds, percent, shorten, size, span, unique_short


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "–"), (0.95556, "95.6\xa0%"), (1.0, "100.0\xa0%"), (0.0, "0.0\xa0%")]
)
def test_percent(value: float | None, expected: str) -> None:
    assert percent(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (900, "900\xa0B"), (2048, "2.0\xa0KiB"), (327_680, "320\xa0KiB"), (1_048_200, "1.0\xa0MiB"),
     (9_332_326, "8.9\xa0MiB"), (250 << 20, "250\xa0MiB")],
)  # fmt: skip
def test_size(value: int | None, expected: str) -> None:
    assert size(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0, "0"), (0.00456, "0.00456"), (0.0712, "0.0712"), (0.1532, "0.153"), (1.234, "1.23"),
     (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234")],
)  # fmt: skip
def test_milliseconds_have_three_digits(value: float | None, expected: str) -> None:
    assert milliseconds(value) == expected


def test_confidence_is_not_rounded_up_to_certainty() -> None:
    assert [confidence(value) for value in (0.994, 0.995, 0.99999, 1.0)] == [
        "99\xa0%", ">\xa099\xa0%", ">\xa099\xa0%", "100\xa0%",
    ]  # fmt: skip


def test_interval_count_span() -> None:
    assert interval(0.9351, 0.97) == "93.5–97.0"
    assert interval(None, 0.97) == "–"
    assert count(1_234_567) == "1,234,567"
    assert [span(8.24), span(252), span(7384)] == ["8.2\xa0s", "4\xa0min 12\xa0s", "2\xa0h 3\xa0min"]


@pytest.mark.parametrize("limit", [1, 2, 5, 12])
def test_shorten_keeps_both_ends(limit: int) -> None:
    short = shorten("abcdefghijklmnop", limit)
    assert len(short) == limit
    assert "…" in short
    if limit >= 3:
        assert short.startswith("a")
        assert short.endswith("p")
    assert shorten("abc", 3) == "abc"


def test_shortened_names_stay_different() -> None:
    names = [f"rosa{middle * 10}canina" for middle in "xyz"] + ["tulip"]
    short = unique_short(names, 12)
    assert len(set(short)) == 4
    assert max(map(len, short)) <= 12
    assert short[3] == "tulip"
