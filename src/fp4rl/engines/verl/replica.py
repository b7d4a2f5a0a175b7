"""verl's vLLM server and replica under an experiment: workers get the plug-in's extension, answers are counted."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

EXTENSION = "fp4rl.engines.verl.extension.Extension"
"""The class by which vLLM extends its worker, imported in the process of that worker."""


class Server(vLLMHttpServer):  # type: ignore[misc]
    """verl's server of one engine; `collective_rpc` of verl's own drops what workers return."""

    _fp4rl_tokens = 0

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as verl does, and count the tokens."""
        output = await super().generate(*args, **kwargs)
        self._fp4rl_tokens += len(output.token_ids)
        return output

    async def fp4rl_begin(self, sites: Sequence[Mapping[str, Any]], injection: Mapping[str, Any]) -> list[str]:
        """Let the worker round and count at `sites`; return what stands against it, in words."""
        self._fp4rl_tokens = 0
        [against] = await self.engine.collective_rpc("fp4rl_begin", args=(sites, injection))
        return list(against)

    async def fp4rl_end(self) -> tuple[int, list[dict[str, Any]]]:
        """Let the worker stop rounding; return the tokens that were answered since, and what each site counted."""
        [counted] = await self.engine.collective_rpc("fp4rl_end")
        return self._fp4rl_tokens, counted

    def _get_worker_extension_cls(self) -> str:
        return EXTENSION


class Replica(vLLMReplica):  # type: ignore[misc]
    """verl's replica, with such a server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(Server)
