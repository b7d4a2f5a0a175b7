"""The checkpoint as vLLM serves it: greedy answers and their log-probabilities against the policy's."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from fp4rl.engines.checkpoints.verify.against import Against
from fp4rl.engines.checkpoints.verify.answers import policy_in
from fp4rl.engines.checkpoints.verify.checkpoint import Checkpoint
from fp4rl.engines.checkpoints.verify.findings import Check
from fp4rl.engines.checkpoints.verify.loaded import evaluating
from fp4rl.engines.checkpoints.verify.trained import Trained, prompt
from fp4rl.engines.environment import for_vllm
from fp4rl.engines.parity.scores import scored
from fp4rl.rl.evaluate import evaluation_runner
from fp4rl.rl.generate import Generation, Sampling, transformers_sampler
from fp4rl.rl.prompts import encoded
from fp4rl.spec.errors import NotFoundError, UserError

_PROBLEMS, _TOKENS, _NATS = 32, 48, 1e-3


def served(checkpoint: Checkpoint, trained: Trained, meant: Against) -> Check:
    """Let vLLM load the folder by itself and answer greedily; compare with the policy in the same dtype.

    Raises NotFoundError where vLLM is not installed. What it cannot load is a difference.
    """
    if find_spec("vllm") is None:
        raise NotFoundError(
            "--engine vllm: vLLM is not installed here; it wants an environment of its own: tools/vllm.sh"
        )
    dtype = meant.dtype if checkpoint.method is None else "bfloat16"  # packed weights are computed in 16 bits
    check, prompts = Check("vllm"), _prompts(trained, meant)
    model, injection = policy_in(dtype, trained, meant)
    sampling = Sampling(_TOKENS, 0.0, logps=True)
    try:
        here = _answers(checkpoint, dtype, prompts, sampling)
    except Exception as error:  # of vLLM's many kinds, and of its worker's
        check.count(models=1)
        check.differs(str(checkpoint.folder), f"vLLM cannot load it: {str(error).splitlines()[0]}", models=1)
        return check
    with evaluating(model, injection), torch.no_grad():
        expected = transformers_sampler(model, trained.tokenizer, prompts, sampling)
        own = scored(model, prompts, here, trained.tokenizer)
    check.count(answers=len(here), tokens=sum(len(answer.tokens) for answer in here))
    for number, (a, b) in enumerate(zip(here, expected, strict=True)):
        if a.tokens != b.tokens[: len(a.tokens)]:
            check.differs(f"answer {number}", f"is {a.text[:40]!r}, of the policy {b.text[:40]!r}", answers=1)
    apart = torch.cat([(a - b.logps).abs() for a, b in zip(own, here, strict=True) if b.logps is not None])
    check.notes.append(f"log-probabilities of its tokens differ by {float(apart.max()):.2g} nats at most")
    if (wrong := int((apart > _NATS).sum())) > len(apart) // 100:
        check.differs("log-probabilities", f"{wrong:,} of {len(apart):,} are over {_NATS:g} nats apart", tokens=wrong)
    return check


def _prompts(trained: Trained, meant: Against) -> list[list[int]]:
    if meant.experiment is not None:
        try:
            problems = evaluation_runner(meant.experiment).problems[:_PROBLEMS]
            return encoded(trained.model, trained.tokenizer, problems)
        except UserError:  # its task is not on this machine: any tokens do
            pass
    ids: list[int] = prompt(trained.model)[0].tolist()
    return [ids[first : first + 8] for first in range(0, len(ids) - 8, 4)]


def _answers(checkpoint: Checkpoint, dtype: str, prompts: Sequence[list[int]], sampling: Sampling) -> list[Generation]:
    for_vllm()
    from vllm import LLM, SamplingParams

    length = max(map(len, prompts)) + sampling.max_new_tokens
    how: dict[str, Any] = {"enforce_eager": True, "max_model_len": length, "disable_log_stats": True}
    engine = LLM(str(checkpoint.folder), dtype=dtype, **how)
    settings = SamplingParams(temperature=0.0, max_tokens=sampling.max_new_tokens, logprobs=0)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
    answers = []
    for each in (output.outputs[0] for output in outputs):
        logps = [step[token].logprob for step, token in zip(each.logprobs, each.token_ids, strict=True)]
        answers.append(Generation(list(each.token_ids), each.text, each.finish_reason == "stop", torch.tensor(logps)))
    return answers
