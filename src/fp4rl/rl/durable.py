"""Make files outlast a power cut: until they are synced the system may keep contents and names in memory alone."""

import os
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file or a folder durable: what was written to it, or which names it holds, outlasts a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_all(folder: Path) -> None:
    """Make a folder durable with everything below it, contents before the names that lead to them."""
    for path in sorted(folder.rglob("*"), reverse=True):
        with suppress(FileNotFoundError):  # a lock, or a partial file, of this moment
            sync(path)
    sync(folder)
