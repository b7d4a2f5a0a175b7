"""Where runs are executed: processes of this machine, a launcher's own, or a Ray cluster."""

from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from fp4rl.engines.environment import launched
from fp4rl.engines.executors.on_ray import RayPool
from fp4rl.engines.executors.processes import LocalPool
from fp4rl.engines.executors.torchrun import TorchrunExecutor
from fp4rl.lab.runner import Executor
from fp4rl.spec.errors import InvalidValueError

STALL_MINUTES = 60.0

StallTimeout = Annotated[
    float,
    typer.Option("--stall-timeout", min=0.0, help="End a run after so many minutes without any progress; 0: never."),
]
Where = Annotated[
    Literal["local", "ray"],
    typer.Option(
        "--executor", help="local: processes of this machine; ray: tasks of a Ray cluster. No number depends on it."
    ),
]
ClusterAddress = Annotated[
    str | None,
    typer.Option("--address", help="Of a Ray cluster (auto, HOST:PORT, ray://...); without it one is started here."),
]


def executor_of(where: str, address: str | None, jobs: int, report_to: Sequence[str], stall_minutes: float) -> Executor:
    """Return what executes runs. Raises InvalidValueError for an address without Ray, and for Ray under a launcher."""
    if address is not None and where != "ray":
        raise InvalidValueError(f"--address {address}: names a Ray cluster; add --executor ray")
    sinks, stall_s = tuple(report_to), 60 * stall_minutes or None
    if launched():
        if where == "ray":
            raise InvalidValueError("--executor ray: a launcher (torchrun) trains the runs itself; drop one of the two")
        return TorchrunExecutor(sinks)
    if where == "ray":
        return RayPool(jobs, address, report_to=sinks, stall_s=stall_s)
    return LocalPool(jobs, report_to=sinks, stall_s=stall_s)
