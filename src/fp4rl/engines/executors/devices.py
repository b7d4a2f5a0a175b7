"""Which accelerators each worker of a pool sees: dealt out evenly, by the environment variable of their kind."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from types import MappingProxyType

# Kind of device, as torch names it -> the variable that says which of them a process sees (also of ROCm).
VISIBLE: Mapping[str, str] = MappingProxyType({"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"})
_FILES = ("/dev/nvidia[0-9]*", "/dev/davinci[0-9]*", "/dev/kfd", "/dev/dxg")  # there is none without one of these
_COUNT = """
import torch
try:
    import torch_npu
except ImportError:
    pass
own = torch.accelerator
print(own.current_accelerator().type, own.device_count()) if own.is_available() else print("none", 0)
"""


@dataclass(frozen=True)
class Devices:
    """The accelerators that this process sees: their kind, and their names in the variable of that kind."""

    kind: str
    names: tuple[str, ...]

    def of_worker(self, worker: int, workers: int) -> dict[str, str]:
        """Return the environment of one of `workers`: an equal part of the devices, in order; where there are more
        workers than devices, one device, which others share."""
        count = len(self.names)
        if count < workers:
            names = self.names[worker % count : worker % count + 1]
        else:
            names = self.names[worker * count // workers : (worker + 1) * count // workers]
        return {VISIBLE[self.kind]: ",".join(names)}


def devices_here() -> Devices | None:
    """Return the accelerators of this machine, as far as this process may see them; None without one.

    Torch counts them in a process of its own: counting sets up the driver, and a process whose driver is set up sees
    what it saw then, and so would all that it starts.
    """
    if not any(map(glob, _FILES)):
        return None
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False)
    kind, _, count = done.stdout.strip().rpartition("\n")[2].partition(" ")
    return seen(kind, int(count) if count.isdigit() else 0)


def seen(kind: str, count: int) -> Devices | None:
    """Return `count` devices of a kind under the names that the environment gives them; None for kinds that have no
    such variable."""
    if kind not in VISIBLE or not count:
        return None
    named = [name.strip() for name in os.environ.get(VISIBLE[kind], "").split(",") if name.strip()]
    return Devices(kind, tuple(named[:count]) if len(named) >= count else tuple(map(str, range(count))))
