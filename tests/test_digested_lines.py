"""Lines with digests: every changed bit is found, unless it leaves the content as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from movq_cli import digested_lines

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.dictionaries(st.text(max_size=6).filter(lambda name: name != "digest"), VALUES, max_size=4)


@given(RECORDS)
def test_a_record_comes_back_from_its_line(record: dict[str, Any]) -> None:
    line = digested_lines.encode(record)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert digested_lines.decode(line) == record
    assert json.loads(line).keys() == {*record, "digest"}
    assert digested_lines.damaged(3 * line) == []


def test_every_changed_bit_of_a_line_is_found_or_changes_nothing() -> None:
    record = {"step": 12, "time": "2026-01-02T03:04:05+00:00", "training": {"loss": 0.25, "codes": [1, 2.5e-7, None]}}
    line = digested_lines.encode(record)
    found = 0
    for position in range(len(line) - 1):
        for bit in range(8):
            changed = bytearray(line)
            changed[position] ^= 1 << bit
            try:
                content = digested_lines.decode(bytes(changed))
            except ValueError:
                found += 1
                continue
            # The name of the field of the digest was changed, or one kind of white space became another.
            assert {name: content[name] for name in record} == record
    assert found > 0.9 * 8 * len(line)


def test_the_numbers_of_damaged_lines_count_from_one_and_leave_out_a_half_line() -> None:
    lines = [digested_lines.encode({"step": step}) for step in range(5)]
    lines[1] = lines[1].replace(b"1", b"7", 1)
    lines[3] = b"\xff\xfe\n"
    assert digested_lines.damaged(b"".join(lines) + lines[0][:9]) == [2, 4]


def test_a_line_without_a_digest_is_not_checked_and_other_lines_are_refused() -> None:
    assert digested_lines.decode(b'{"step": 3}') == {"step": 3}
    for line in (b"", b"[1]", b"3", b'{"step": 3, "digest": 5}', b'{"digest": "xxh3-128:0"}', b"[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            digested_lines.decode(line)
