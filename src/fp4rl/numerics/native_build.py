"""Compiling the C kernels with the system's compiler, once a machine and version, into the user's cache folder.

The file's name holds a digest of the sources, the flags and the processor's features, so that a library is never loaded
for other sources or on another machine. Building takes a few seconds; loading a built one about a millisecond.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
SOURCES = ("fake.c", "pack.c")
FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
TUNED = ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ("-mcpu=native",)
COMPILERS = ("cc", "gcc", "clang")


class BuildFailed(Exception):
    """Compiling the kernels failed; the message is the compiler's."""


def library_path() -> Path:
    """Return the path of this machine's library, built or not."""
    return _folder() / f"kernels-{_digest()}.so"


def compiler() -> str | None:
    """Return the C compiler's path, None where there is none."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def load() -> ctypes.CDLL | None:
    """Return the built library, None where it is not built yet (or cannot be loaded)."""
    path = library_path()
    try:
        return ctypes.CDLL(str(path)) if path.is_file() else None
    except OSError:
        return None


def build() -> ctypes.CDLL:
    """Compile the kernels and load them; raises BuildFailed without a compiler, or when it fails.

    The finished file moves into place in one step, so that processes that build at once do not disturb each other.
    """
    program = compiler()
    if program is None:
        raise BuildFailed(f"no C compiler is installed (looked for {', '.join(COMPILERS)})")
    path = library_path()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        sources = [str(KERNELS / name) for name in SOURCES]
        for tuning in (TUNED, ()):
            command = [program, *FLAGS, *tuning, *sources, "-o", str(made), "-lm"]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode == 0:
                made.replace(path)
                return ctypes.CDLL(str(path))
    raise BuildFailed(run.stderr.strip() or f"{program} failed with exit code {run.returncode}")


@cache
def _folder() -> Path:
    """Return a folder that only this user can write: beside other caches, or in the temporary folder."""
    for root in (Path.home() / ".cache" / "fp4rl", Path(tempfile.gettempdir()) / f"fp4rl-{os.getuid()}"):
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if root.stat().st_uid == os.getuid() and os.access(root, os.W_OK):
            return root
    raise BuildFailed("neither the home's .cache nor the temporary folder can be written")


@cache
def _digest() -> str:
    texts = [path.read_bytes() for path in sorted(KERNELS.iterdir())]
    return hashlib.sha256(b"\0".join([*texts, " ".join(FLAGS + TUNED).encode(), _processor()])).hexdigest()[:16]


def _processor() -> bytes:
    """Return what `-march=native` means here: the processor's feature flags on Linux, its name elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {flags}".encode()
