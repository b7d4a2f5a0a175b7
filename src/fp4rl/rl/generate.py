"""Generate answers, and compute the log-probabilities of given ones as in generation: the whole model, dropout off.

The only place where rollouts and evaluations call an engine, so that another engine plugs in here. Dropout acts where
a policy is trained and nowhere else.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fp4rl.models.fit import end_ids
from fp4rl.models.positions import forward_inputs
from fp4rl.rl.finite import FiniteLogits
from fp4rl.rl.prompts import padded
from fp4rl.rl.routing import Recorder
from fp4rl.sites.observe import require_finite_rows
from fp4rl.spec.errors import NotFoundError, nearest
from fp4rl.spec.evidence import WeightsServed
from fp4rl.spec.rollout import RolloutEngine


def whole_sequences(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate prompts and answers: token ids and attention mask, both [rows, P + T]."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def answer_logps(
    model: Any,
    batch: dict[str, Tensor],
    *,
    rows: int,
    entropy: bool = False,
    before: Callable[[slice], None] = lambda _: None,
) -> tuple[Tensor, Tensor | None]:
    """Compute log-probabilities of a batch's answers, `rows` sequences at a time; `before(rows)` is called for each.

    `model` has TRL's fused head, which divides by the temperature. Returns log-probabilities [answers, T] and, with
    `entropy`, the entropies of their distributions; both 0 in the padding. Raises NotFinite.
    """
    (ids, mask), width = whole_sequences(batch), batch["completion_ids"].shape[1]
    logps, entropies = [], []
    for first in range(0, len(ids), rows):
        span = slice(first, first + rows)
        these, real = ids[span], mask[span]
        before(span)
        labels = these.masked_fill(real == 0, -100)
        labels[:, :-width] = -100
        inputs = forward_inputs(model, these, real)
        output = model(**inputs, labels=labels, fused_lm_head=True)
        logps.append(output.log_probs[:, -width:])
        require_finite_rows(logps[-1], "log-probabilities of answers", model, partial(model, **inputs))
        if entropy:
            entropies.append(output.entropy[:, -width:])
    return torch.cat(logps), torch.cat(entropies) if entropy else None


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode inside the `with`, and back into its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def drops(model: nn.Module) -> bool:
    """Return whether `model` is random in training mode, by running it once.

    It need not have a dropout layer for that: OPT calls the function, some models skip whole layers or add noise to a
    router. The random generators are left as they were.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    with torch.random.fork_rng():
        before = _random_state(device)
        try:
            model(input_ids=torch.ones(1, 8, dtype=torch.long, device=device), use_cache=False)
        finally:
            model.train(was_training)
        return not torch.equal(before, _random_state(device))


def _random_state(device: torch.device) -> Tensor:
    """Return the states of the CPU's and the device's random generators, which dropout draws from."""
    states = [torch.random.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return torch.cat(states)


# A token holds at least one byte, so the last n bytes of an answer are in its last n tokens; a few more to be safe.
_SPARE = 8


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: `temperature` 0 is greedy, `count` answers are given to each prompt.

    Each of the texts in `stop` ends an answer and is not part of it. With `logps` the log-probabilities of the tokens
    are returned too, with `routes` their experts.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    count: int = 1
    stop: tuple[str, ...] = ()
    logps: bool = False
    routes: bool = False


class Generation(NamedTuple):
    """One answer. `tokens` include what ended it, `text` does not; `ended`: whether it ended before the limit.

    `logps` [tokens]: log-probability of each token under softmax(logits / temperature) over the whole vocabulary, as
    the loss computes it; None where `Sampling.logps` is off. `routes` [prompt and answer but its last token, layers,
    k]: the experts of each token; None without `Sampling.routes`, or where the sampler does not know them.
    """

    tokens: list[int]
    text: str
    ended: bool
    logps: Tensor | None = None
    routes: Tensor | None = None


class Sampler(Protocol):
    """An engine that answers prompts with the present weights of `model`, rounding and noise included."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        sampling: Sampling,
    ) -> list[Generation]:
        """Return `sampling.count` consecutive answers to each of `prompts` (token ids).

        All randomness comes from torch's global generator, which the caller has seeded.
        """
        ...


@torch.no_grad()
def transformers_sampler(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], sampling: Sampling
) -> list[Generation]:
    """Generate with the live model by transformers' `generate`, dropout off. Raises NotFinite."""
    ids, mask = (part.to(next(model.parameters()).device) for part in padded(prompts, tokenizer.pad_token_id))
    keeper = SampledLogprobs(sampling.temperature or 1.0) if sampling.logps else None
    ends, start = end_ids(model), ids.shape[1]
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.count,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        **(drawn if sampling.temperature else {"do_sample": False}),
    )
    recorder = Recorder()
    with dropout_off(model), recorder.recording(model) if sampling.routes else nullcontext():
        sequences = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            synced_gpus=False,  # weights are whole while sampling, and processes may sample other numbers of times
            logits_processor=LogitsProcessorList(
                [FiniteLogits(model, mask), *([keeper] if keeper is not None else [])]
            ),
            stopping_criteria=StoppingCriteriaList([Stops(tokenizer, sampling.stop, start)] if sampling.stop else []),
        )
    new = sequences[:, start:]
    logps = keeper.finish(sequences) if keeper is not None else None  # [answers, T]
    routes = recorder.routes(*sequences[:, 1:].shape)  # the last token is drawn and not fed
    answers = []
    for row, (length, ended) in enumerate(zip(*until_end(new, ends), strict=True)):
        answer = cut(tokenizer, new[row, :length].tolist(), ended, sampling.stop)
        first, size = start - int(mask[row // sampling.count].sum()), len(answer.tokens)
        answers.append(
            answer._replace(
                logps=None if logps is None else logps[row, :size],
                routes=None if routes is None else routes[row, first : start + size - 1],
            )
        )
    return answers


# One entry an engine; the key `rollout.engine` of an experiment chooses it. Engines above this room add theirs.
SAMPLERS: dict[str, Callable[[RolloutEngine], Sampler]] = {"transformers": lambda _: transformers_sampler}


def sampler_named(chosen: RolloutEngine) -> Sampler:
    """Make the sampler that an experiment names. Raises NotFoundError."""
    if chosen.engine not in SAMPLERS:
        raise NotFoundError(f"no rollout.engine {chosen.engine!r}{nearest(chosen.engine, SAMPLERS)}")
    return SAMPLERS[chosen.engine](chosen)


def evidence_of(sampler: Sampler) -> list[WeightsServed]:
    """Return what an engine outside this process recorded since this was asked last; nothing of one inside it."""
    told: Callable[[], list[WeightsServed]] = getattr(sampler, "evidence", list)
    return told()


class SampledLogprobs(LogitsProcessor):  # type: ignore[misc]
    """Records log pi(token) of every token as it is sampled, holding the logits of one step at a time.

    A processor sees the logits of step t before the sampler draws from them, and the drawn token at step t + 1; so one
    table of [answers, vocabulary] is kept instead of one per step.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._logits: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Keep the logits [answers, vocabulary] of the next token, and return them unchanged."""
        self._drawn(input_ids)
        self._logits = scores
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """Return log-probabilities [answers, new tokens] of the finished `sequences`; those of padding mean nothing."""
        self._drawn(sequences)
        return torch.stack(self._columns, dim=1)

    def _drawn(self, sequences: Tensor) -> None:
        if self._logits is None:
            return
        logits = self._logits.float() / self._temperature
        chosen = logits.gather(-1, sequences[:, -1:]).squeeze(-1)
        self._columns.append(chosen - logits.logsumexp(-1))
        self._logits = None


def until_end(tokens: Tensor, end_ids: Sequence[int]) -> tuple[list[int], list[bool]]:
    """Return each answer's length, its first end token included, and whether it has one; tokens [answers, T]."""
    is_end = torch.isin(tokens, torch.tensor(list(end_ids), device=tokens.device))
    ended = is_end.any(dim=1)
    lengths = torch.where(ended, is_end.int().argmax(dim=1) + 1, tokens.shape[1])
    return lengths.tolist(), ended.tolist()


class Stops(StoppingCriteria):  # type: ignore[misc]
    """Ends a row of a generation once its new text, from token `start` on, holds one of the texts in `stop`.

    It looks at the decoded text that will be scored, however it is split into tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, tuple(stop), start
        self._window = max(len(text.encode()) for text in stop) + _SPARE

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return which rows [answers] of `input_ids` hold a stop text."""
        last = input_ids[:, max(self._start, input_ids.shape[1] - self._window) :]
        texts = self._tokenizer.batch_decode(last, skip_special_tokens=True)
        return torch.tensor([_holds(text, self._stop) for text in texts], device=input_ids.device)


def cut(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ended: bool, stop: Sequence[str]) -> Generation:
    """End an answer at the first of `stop`; `ended` tells whether an end token follows `tokens`."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    if not _holds(text, stop):
        return Generation(tokens, text, ended)

    def stopped(length: int) -> bool:
        return _holds(str(tokenizer.decode(tokens[:length], skip_special_tokens=True)), stop)

    length = bisect_left(range(len(tokens)), True, key=stopped)
    return Generation(tokens[:length], text[: min(text.find(words) for words in stop if words in text)], True)


def _holds(text: str, stop: Sequence[str]) -> bool:
    return any(words in text for words in stop)
