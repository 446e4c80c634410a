"""Encodings of text that people write: UTF-8, or UTF-16 from Windows; and names of files, which may be in none."""

from __future__ import annotations

import codecs
import re

_SURROGATE = re.compile("[\ud800-\udfff]")

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
"""Marks at the beginning of a text, and the encodings that they stand for. PowerShell's `>` writes UTF-16."""


class TextEncodingError(ValueError):
    """A text is in an encoding that is not read; the message says why, and what to do."""


def decode_text(data: bytes, *, is_list_of_files: bool = False) -> str:
    """Return a text that is in UTF-8, or in UTF-16 with a mark at its beginning; the mark is not part of the text.

    Args:
        data: Bytes of the text.
        is_list_of_files: Whether bytes that are not UTF-8 stay what they are, as surrogates, because the name of a file
            may consist of any bytes.

    Raises:
        TextEncodingError: The text is in another encoding.
    """
    mark, encoding = next((pair for pair in _MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    if not mark and b"\0" in data:
        raise TextEncodingError("it has bytes that are zero, so that it is no text in UTF-8. Save it as UTF-8")
    try:
        return data[len(mark) :].decode(encoding, "surrogateescape" if is_list_of_files and not mark else "strict")
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        raise TextEncodingError(
            f"it is not {encoding.upper()} in line {line}. Save it as UTF-8, or convert it: iconv -f latin1 -t utf-8"
        ) from None


def storable_text(text: str) -> str:
    r"""Return a name with escapes such as `\xe9` in place of bytes that are not UTF-8, which no JSON file can hold.

    Args:
        text: Name of a file or folder, in which surrogates stand for these bytes.
    """
    return _SURROGATE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
