"""The log of a run that goes on from a checkpoint: what was written after the checkpoint is removed.

A killed run has logged steps after its last checkpoint, which the resumed run makes and logs again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from movq_cli import digested_lines
from movq_cli.files import atomic_write
from movq_cli.runs import Run

_STEP_KEY = b"\x10"
"""Key of field 2, `step`, in a serialized TensorBoard event; the field is omitted at step 0."""
_TIME_BYTES = 9
"""Length of field 1, the time, which comes first: its key and eight bytes."""
_RECORD_HEADER = 12
"""Length of the header of a record in an event file: 8 bytes for the length of its data, 4 for a checksum."""
_CHECKSUM = 4
"""Length of the checksum after the data of a record."""


def rewind(run: Run, step: int, *, repeats_validation: bool) -> int:
    """Remove from the log and the TensorBoard events of a run what lies after a step, and damaged lines of the log.

    Args:
        run: Run folder.
        step: Number of steps after which the run goes on.
        repeats_validation: Whether the validation after this step is made again, so that its metrics are removed too.

    Returns:
        The number of damaged lines; a line that a killed process has written in part is none.

    Raises:
        FailureError: A file cannot be replaced.
        OSError: A file cannot be read.
    """
    damaged = 0
    if run.log.is_file():
        before = run.log.read_bytes()
        kept: list[bytes] = []
        for line in before.splitlines(keepends=True):
            stays = _stays(line, step, repeats_validation)
            if stays:
                kept.append(line)
            damaged += stays is None
        after = b"".join(kept)
        if after != before:
            atomic_write(run.log, after)
    for path in sorted(run.events.glob("events.out.tfevents.*")):
        before = path.read_bytes()
        after = b"".join(_events_until(before, step, repeats_validation))
        if after != before:
            atomic_write(path, after)
    return damaged


def _stays(line: bytes, step: int, repeats_validation: bool) -> bool | None:
    """Return whether a line of a log stays; None if it is damaged."""
    if not line.endswith(b"\n"):
        return False
    try:
        record = digested_lines.decode(line)
        is_repeated = repeats_validation and "validation" in record
        return bool(record["step"] < step or (record["step"] == step and not is_repeated))
    except (ValueError, TypeError, LookupError):
        return None


def _events_until(data: bytes, step: int, repeats_validation: bool) -> Iterator[bytes]:
    """Yield the records of an event file that stay; a record that a killed process has written in part is left out."""
    start = 0
    while start + _RECORD_HEADER <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + _RECORD_HEADER + length + _CHECKSUM
        if end > len(data):
            return
        event = data[start + _RECORD_HEADER : end - _CHECKSUM]
        of_event = _step_of(event)
        # An event has one scalar, whose name is in it as plain text.
        is_repeated = repeats_validation and of_event == step and b"validation" in event
        if of_event <= step and not is_repeated:
            yield data[start:end]
        start = end


def _step_of(event: bytes) -> int:
    """Return the step of a serialized TensorBoard event: a variable-length integer, seven bits in a byte."""
    if event[_TIME_BYTES : _TIME_BYTES + 1] != _STEP_KEY:
        return 0
    step = shift = 0
    for byte in event[_TIME_BYTES + 1 :]:
        step |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return step
