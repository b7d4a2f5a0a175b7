"""The plain lines of a console log: without colours, worker prefixes, overwritten progress bars and broken bytes."""

import re
from collections.abc import Iterator

# CSI sequences (colours, cursor), OSC sequences (titles, links), and two-character escapes: ECMA-48.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
_WORKER = re.compile(r"\([A-Za-z_][\w.:]*(?: [\w.]+=[^\s,)]+,?)*\s?pid=\d+(?:, ip=[^)\s]+)?\)\s?")
_REPEATED = re.compile(r"\s*\[repeated \d+x across cluster\].*$")


def plain_lines(data: bytes) -> Iterator[str]:
    """Every piece between newlines, carriage returns and Ray's `(Worker pid=1, ip=...)` prefixes.

    Bytes that are no UTF-8 become U+FFFD, so that one of them never loses the line it stands in.
    """
    text = _ESCAPES.sub("", data.decode("utf-8", errors="replace"))
    for line in re.split(r"[\r\n]+", text):
        for piece in _WORKER.split(line):
            if piece.strip():
                yield _REPEATED.sub("", piece)
