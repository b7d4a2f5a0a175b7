"""How processes end: what is told of one that died without a message, and a watch that ends one with its parent."""

import os
import signal
import time
from typing import Any


def described(code: int | None) -> str:
    """Describe an exit code in words: its signal, where there is one."""
    if code is None or code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name + (", often for want of memory" if -code == signal.SIGKILL else "")


def die_with(parent: int, every_s: float = 0.5) -> Any:
    """Watch the parent from a thread, and end this process with it: a killed parent cannot end its children."""
    while os.getppid() == parent:
        time.sleep(every_s)
    os._exit(1)
