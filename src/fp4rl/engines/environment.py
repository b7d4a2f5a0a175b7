"""Environment variables, read only here: the rounding backend, a launcher of several processes, a run inside verl."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.legacy import PREFIX

VARIABLE = "FP4RL_BACKEND"
VERL_SPEC = "FP4RL_VERL_SPEC"
"""The path of the experiment that a run of verl is under."""


def choose_backend(announce: Callable[[str], None]) -> None:
    """Force the backend that FP4RL_BACKEND names, `auto` without it; `announce` gets lines about compilation.

    Raises InvalidValueError for an unknown backend and for one that cannot work here.
    """
    from fp4rl.numerics.dispatch import use

    try:
        use(os.environ.get(VARIABLE) or "auto", announce)
    except InvalidValueError as error:
        raise InvalidValueError(f"{VARIABLE}: {error}") from None


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_vllm() -> None:
    """Let vLLM run inside this process, and log warnings alone, where nothing else is asked for."""
    for name, value in (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_LOGGING_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def verl_spec() -> str | None:
    """Return the path of the experiment that this process of a verl run is under; None without one."""
    return os.environ.get(VERL_SPEC) or None


def noisy_operators() -> dict[str, str]:
    """Return the variables by which a fork of verl was told of noisy operators; nothing else reads them."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


def choose_engine(vendor: str) -> None:
    """Let verl take its engines of this vendor. Raises InvalidValueError where those of another one are asked for."""
    if os.environ.setdefault("VERL_ENGINE_VENDOR", vendor) != vendor:
        raise InvalidValueError(
            f"VERL_ENGINE_VENDOR is {os.environ['VERL_ENGINE_VENDOR']}, and {VERL_SPEC} needs {vendor}; unset it"
        )


def launched() -> bool:
    """Return whether a launcher has started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def forget_launcher() -> None:
    """Make this process one that no launcher has started, for work that it does by itself."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def rank_of_launcher() -> int:
    """Return the number that a launcher has given this process, from 0."""
    return int(os.environ["RANK"])


def leave(code: int) -> NoReturn:
    """End this process at once, since tearing down a process group at times aborts although everything is done."""
    if code == 0:
        from torch import distributed

        if distributed.is_initialized():  # the first to end closes its connections, so all wait to end together
            with suppress(RuntimeError):  # one that got through first may have ended already
                distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
