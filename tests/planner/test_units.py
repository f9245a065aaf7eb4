"""Quantities as people write them."""

import pytest

from shardopt.errors import PlanError
from shardopt.planner.units import parse_count, parse_nbytes, parse_rate, parse_seconds


@pytest.mark.parametrize(
    ("parse", "word", "value"),
    [
        (parse_rate, "200Gbit", 25e9),
        (parse_rate, "200 Gbit/s", 25e9),
        (parse_rate, "400GB/s", 400e9),
        (parse_rate, "1GiB/s", 2**30),
        (parse_rate, "1e9B/s", 1e9),
        (parse_seconds, "5us", 5e-6),
        (parse_seconds, "1.5ms", 1.5e-3),
        (parse_seconds, "2h", 7200),
        (parse_seconds, "30d", 30 * 86400),
        (parse_nbytes, "4MiB", 4 << 20),
        (parse_nbytes, "80GB", 80 * 10**9),
        (parse_count, "7e9", 7 * 10**9),
        (parse_count, "7B", 7 * 10**9),
        (parse_count, "350M", 350 * 10**6),
        (parse_count, "16", 16),
    ],
)
def test_a_quantity(parse, word, value):
    assert parse("--x", word) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("parse", "word"),
    [
        (parse_rate, "200"),
        (parse_rate, "GB/s"),
        (parse_rate, "1e400GB/s"),
        (parse_rate, "nanGB/s"),
        (parse_rate, "5us"),
        (parse_seconds, "5"),
        (parse_seconds, "0s"),
        (parse_seconds, "-1s"),
        (parse_nbytes, "4"),
        (parse_count, "0"),
        (parse_count, "1.5"),
        (parse_count, "1..5e3"),
        (parse_count, "seven"),
        (parse_count, ""),
    ],
)
def test_a_wrong_quantity(parse, word):
    with pytest.raises(PlanError, match=r"--link must be .+; got '.*'\. Write the number"):
        parse("--link", word)
