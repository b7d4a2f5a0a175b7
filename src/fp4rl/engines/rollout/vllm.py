"""vLLM in this process as a sampler: it holds the weights of the live model's stream, and rounds what the model rounds.

The inputs of vLLM's linear layers, and the keys and values that it stores, are rounded by the states of the model's own
sites (`kinds`), so that the evidence of a rollout is the same whoever sampled it.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.engines.environment import for_vllm
from fp4rl.engines.rollout.held import follow_embeddings, require_held
from fp4rl.engines.rollout.kinds import active, rounding
from fp4rl.engines.rollout.known import prepare, require_routes
from fp4rl.engines.rollout.mixture import begin_reload, require_reloaded
from fp4rl.engines.rollout.request import audited, cut_answer, parameters, require_possible
from fp4rl.rl.generate import Generation, Sampling
from fp4rl.rl.stream import injected_states, weight_stream
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.rollout import RolloutEngine

_VLLM = RolloutEngine(engine="vllm")
_ROOM = 64  # tokens that the engine's longest sequence is rounded up to


class Vllm:
    """A sampler (`rl.generate.Sampler`). An engine is made at the first call for the folder of a model.

    Raises InvalidValueError for what happens in the model and would not happen in vLLM, such as rounded outputs
    and hardware errors (`kinds.py`, `known.py`).
    """

    def __init__(self, chosen: RolloutEngine = _VLLM) -> None:
        self._chosen = chosen
        self._llm: Any = None
        self._folder = ""
        self._length = self._calls = 0

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        sampling: Sampling,
    ) -> list[Generation]:
        """Answer `prompts` with the present weights of `model`; see `Sampler`."""
        from vllm import SamplingParams

        states = active(injected_states(model))
        require_possible(states, sampling)
        self._require_engine(model, max(map(len, prompts)) + sampling.max_new_tokens)
        prepare(self.module)
        self.refresh(model)
        self._calls += 1
        if audited(self._calls):
            require_held(self.module, weight_stream(model))
        with rounding(self.module, states):
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                [SamplingParams(**each) for each in parameters(model, sampling, len(prompts))],
                use_tqdm=False,
            )
        return [_answer(tokenizer, each, sampling) for output in outputs for each in output.outputs]

    @property
    def module(self) -> nn.Module:
        """The model that vLLM computes with."""
        return self._llm.llm_engine.model_executor.driver_worker.worker.get_model()  # type: ignore[no-any-return]

    def refresh(self, model: PreTrainedModel) -> None:
        """Give the engine the weights that the model computes with now, before every call: none can be missed."""
        worker = self._llm.llm_engine.model_executor.driver_worker.worker
        begin_reload(self.module)
        worker.model_runner.reload_weights(weights_iterator=weight_stream(model))
        require_reloaded(self.module)
        follow_embeddings(self.module)

    def _require_engine(self, model: Any, length: int) -> None:
        folder = getattr(model, "get_base_model", lambda: model)().name_or_path
        if self._llm is not None and length <= self._length and folder == self._folder:
            return
        if length > (self._chosen.max_model_len or length):
            raise InvalidValueError(
                f"rollout.max_model_len {self._chosen.max_model_len}: prompt and answer take up to {length} tokens"
            )
        require_routes(model.config)
        self._length = self._chosen.max_model_len or -(-length // _ROOM) * _ROOM
        self._folder = folder
        self._llm = None  # the former one, for shorter sequences or another model, is let go first
        for_vllm()
        with _randomness_kept():
            from vllm import LLM  # its environment is one of its own: docs/how-to/scale.md

            self._llm = LLM(
                folder,
                dtype=str(model.dtype).removeprefix("torch."),
                max_model_len=self._length,
                enforce_eager=True,
                enable_prefix_caching=False,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                **self._chosen.model_dump(include={"gpu_memory_utilization"}),
            )


def _answer(tokenizer: PreTrainedTokenizerBase, output: Any, sampling: Sampling) -> Generation:
    tokens = list(output.token_ids)
    logps = [step[token].logprob for step, token in zip(output.logprobs or (), tokens, strict=sampling.logps)]
    return cut_answer(tokenizer, tokens, output.finish_reason == "stop", logps, sampling)


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Keep the random generators of this process, which vLLM seeds when it starts."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
