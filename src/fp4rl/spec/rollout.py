"""Which engine answers in rollouts and evaluations, and how it is reached."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from fp4rl.spec.errors import shown
from fp4rl.spec.frozen import Spec, later_key


class RolloutEngine(Spec):
    """What generates the answers: `transformers`, or vLLM in this process or, with `server`, in another one."""

    engine: str = Field(default="transformers", description="transformers or vllm")
    server: str | None = later_key(None, description="of vllm: the address of a running server, http://HOST:PORT")
    gpu_memory_utilization: float | None = later_key(
        None, gt=0, le=1, description="of vllm in this process: the share of the device's memory that it takes"
    )
    max_model_len: PositiveInt | None = later_key(
        None, description="of vllm in this process: tokens of its longest sequence; as needed where it is not set"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_a_name(cls, value: Any) -> Any:
        return {"engine": value} if isinstance(value, str) else value

    def _conflicts(self) -> Iterator[str]:
        if self.server is not None and not re.fullmatch(r"https?://[^/\s]+", self.server):
            yield f"rollout.server {shown(self.server)} is no address; write http://HOST:PORT"
        if self.server is not None and self.engine != "vllm":
            yield f"rollout.server is of engine vllm, and engine {self.engine} asks none"


TRANSFORMERS = RolloutEngine()
"""The model of the run itself answers."""
