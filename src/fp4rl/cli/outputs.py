"""Files that a verb is asked to write, looked at before the work whose result they are to hold."""

import os
import tempfile
from pathlib import Path

from fp4rl.spec.errors import InvalidValueError


def require_writable(file: Path | None, option: str) -> None:
    """Raise InvalidValueError where `file`, given as `option`, could not be written after the work."""
    if file is None:
        return
    if file.is_dir():
        raise InvalidValueError(f"{option} {file}: is a folder; name a file")
    if not file.parent.is_dir():
        raise InvalidValueError(f"{option} {file}: there is no folder {file.parent}; make it, or name another place")
    if file.exists() and os.access(file, os.W_OK):  # such as /dev/stdout, whose folder is not the user's
        return
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InvalidValueError(f"{option} {file}: cannot write there ({error.strerror}); name another place") from None
