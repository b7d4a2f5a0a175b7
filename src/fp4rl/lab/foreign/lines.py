"""The plain lines of a console log: without colours, worker prefixes, overwritten progress bars and broken bytes."""

import codecs
import re
from collections.abc import Iterator

# CSI sequences (colours, cursor), OSC sequences (titles, links), and two-character escapes: ECMA-48.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
_WORKER = re.compile(r"\([A-Za-z_][\w.:]*(?: [\w.]+=[^\s,)]+,?)*\s?pid=\d+(?:, ip=[^)\s]+)?\)\s?")
_REPEATED = re.compile(r"\[repeated \d+x across cluster\].*$")


def text_of(data: bytes) -> str:
    """The text of a log: UTF-8, or UTF-16 as PowerShell redirects it. Bytes that are neither become U+FFFD.

    NUL bytes are what a machine that lost power leaves in a file; they are taken out.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in data[:64]
    text = data.decode("utf-16" if utf16 else "utf-8", errors="replace")
    return text.removeprefix("\ufeff").replace("\0", "")


def plain_lines(data: bytes) -> Iterator[str]:
    """Every piece between newlines, carriage returns and Ray's `(Worker pid=1, ip=...)` prefixes.

    Bytes that are no UTF-8 become U+FFFD, so that one of them never loses the line it stands in.
    """
    text = _ESCAPES.sub("", text_of(data))
    for line in re.split(r"[\r\n]+", text):
        for piece in _WORKER.split(line):
            if piece.strip():
                yield _REPEATED.sub("", piece).rstrip()
