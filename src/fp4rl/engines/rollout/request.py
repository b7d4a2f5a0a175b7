"""What is asked of vLLM, in this process or as a server, and what is made of its answers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fp4rl.engines.rollout.kinds import not_computed
from fp4rl.inject.site import SiteState
from fp4rl.models.fit import end_ids
from fp4rl.rl.generate import Generation, Sampling, cut
from fp4rl.spec.errors import InvalidValueError


def require_possible(states: Sequence[SiteState], sampling: Sampling) -> None:
    """Raise InvalidValueError for what happens in the model and would not happen in vLLM."""
    if sampling.temperature and sampling.top_p < 1:
        raise InvalidValueError("rollout.engine vllm gives log-probabilities of what top_p leaves alone; take top_p: 1")
    for what in filter(None, map(not_computed, states)):
        raise InvalidValueError(f"rollout.engine vllm does not compute {what}")


def audited(call: int) -> bool:
    """Return whether vLLM's weights are compared with the stream at a call: at 1, 2, 4, ... and at every 64th."""
    return call & (call - 1) == 0 or call % 64 == 0


def parameters(model: Any, sampling: Sampling, count: int) -> list[dict[str, Any]]:
    """Return vLLM's sampling parameters for each of `count` prompts, as plain values.

    The seed of each is drawn from torch's generator, which the caller has seeded.
    """
    ends = list(end_ids(getattr(model, "get_base_model", lambda: model)()))
    alike = {
        "n": sampling.count,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": 0 if sampling.logps else None,
        "stop": list(sampling.stop),
        "stop_token_ids": ends,
        "skip_special_tokens": True,
    }
    return [{**alike, "seed": seed} for seed in torch.randint(2**31, (count,)).tolist()]


def cut_answer(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], ended: bool, logps: Sequence[float], sampling: Sampling
) -> Generation:
    """Return an answer as the sampler of transformers gives it; `logps`: one a token, where they were asked for."""
    answer = cut(tokenizer, tokens, ended, sampling.stop)
    if not sampling.logps:
        return answer
    return answer._replace(logps=torch.tensor(logps[: len(answer.tokens)], dtype=torch.float32))
