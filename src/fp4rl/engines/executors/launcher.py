"""`python -m fp4rl.engines.executors.launcher COUNT FOLDER`: torch's launcher, which ends with the one who started it.

When all processes have ended it writes the exit codes of those that failed to its standard output, as JSON.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from fp4rl.engines.executors.deaths import die_with

_RANK = "fp4rl.engines.executors.rank"


def launch(count: str, folder: Path) -> dict[int, int]:
    """Start `count` processes of this machine and wait for them; return rank -> exit code of those that failed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    torchrun: Any = run
    options = ["--standalone", "--nproc-per-node", count, "--redirects", "3", "--log-dir", str(folder / "logs")]
    try:
        torchrun.run(torchrun.parse_args([*options, "-m", _RANK, str(folder)]))
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    return {}


if __name__ == "__main__":
    threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
    sys.stdout.write(json.dumps(launch(sys.argv[1], Path(sys.argv[2]))))
