"""The embedded model: small enough to be made and warmed up here, Qwen2-shaped so that it is treated like any other.

Its recipe decides every bit of it. Weights and order come from generators of their own, and the warm-up runs on one
thread, because sums that are split over another number of threads round differently. Only the largest size is warmed
up on an accelerator.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from fp4rl.models import tokenizer as tokenizer_code
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.model import Embedded
from fp4rl.spec.words import counted

Example = tuple[str, str]  # prompt, and the solution that follows it after a blank
IGNORED = -100


def build(recipe: Embedded, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Build the model before its warm-up, in float32: normal weights, zero biases, unit norms."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=recipe.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=recipe.initializer_range,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                weight.normal_(0.0, recipe.initializer_range, generator=generator)
    return model.eval()


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    recipe: Embedded,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Train in place on the tokens of the solutions alone; return the mean loss of the last tenth of the steps (nan
    without steps).

    `on_step(step, loss)` is called after each step, with steps counted from 1 and the loss in nats per token. Examples
    are shuffled once, and repeated in that order where there are fewer than the steps take.
    """
    if not recipe.warm_up_steps:
        return float("nan")
    if not examples:
        raise InvalidValueError("no examples to warm up on; give some, or set warm_up_steps to 0")
    losses: list[float] = []
    device = _device(recipe)
    model.to(device)
    with one_thread():
        batches = _batches(tokenizer, examples, recipe)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.warm_up_lr, weight_decay=0.0, fused=True)
        model.train()
        for step, (ids, labels) in enumerate(batches, start=1):
            optimizer.param_groups[0]["lr"] = recipe.warm_up_lr * _rise_and_fall(step, recipe)
            loss = _loss(model, ids.to(device), labels.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if on_step is not None:
                on_step(step, losses[-1])
    model.to("cpu").eval()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def cached(
    folder: Path,
    recipe: Embedded,
    examples: Sequence[Example],
    on_step: Callable[[int, float], None] | None = None,
) -> Path:
    """Return the folder of the warmed-up model and its tokenizer, in Hugging Face's layout; made on the first call.

    Its name holds a digest of the recipe, of the examples, of the code that makes it and of the versions of torch and
    transformers, so that a change never finds an old model. It is written under another name and renamed, so that it
    appears whole or not at all. Of two processes that need it at once, one makes it and the other waits.
    """
    content = _content(recipe, examples)
    made = folder / f"tiny-{digest(content)}"
    if made.is_dir():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock")):  # released when the process dies
        if not made.is_dir():
            half_made = made.with_suffix(".partial")
            shutil.rmtree(half_made, ignore_errors=True)  # left by a process that was killed, since we hold the lock
            tokenizer = tokenizer_code.build_tokenizer()
            model = build(recipe, tokenizer)
            loss = warm_up(model, tokenizer, examples, recipe, on_step)
            try:
                model.save_pretrained(half_made)
                tokenizer.save_pretrained(half_made)
                (half_made / "recipe.json").write_text(json.dumps({**content, "final_loss": loss}, indent=1) + "\n")
                half_made.rename(made)
            except BaseException:
                shutil.rmtree(half_made, ignore_errors=True)
                raise
    return made


def _content(recipe: Embedded, examples: Sequence[Example]) -> dict[str, object]:
    code = b"".join(Path(file).read_bytes() for file in (__file__, tokenizer_code.__file__))
    return {
        "recipe": recipe.model_dump(mode="json"),
        "examples": digest(examples),
        "code": hashlib.sha256(code).hexdigest()[:12],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the `with`, afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(recipe: Embedded) -> torch.device:
    """Return where the warm-up computes; InvalidValueError where that is an accelerator and torch has none."""
    if recipe.warm_up_on == "cpu":
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator(True)
    if device is None:
        raise InvalidValueError(
            f"model.embedded.warm_up_on: accelerator, and torch has none here; write cpu, where "
            f"{counted(recipe.warm_up_steps, 'step')} of this size can take hours"
        )
    return device


def _rise_and_fall(step: int, recipe: Embedded) -> float:
    """Return the share of the learning rate at a step counted from 1: a linear rise, then constant."""
    rise = max(1, round(recipe.warm_up_rise * recipe.warm_up_steps))
    return min(1.0, step / rise)


def _loss(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of labelled tokens; `ids` and (shifted) `labels` are [batch, time]."""
    # No attention mask: padding is on the right, where a causal model cannot look, and attention is faster without.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    counted = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[counted]), labels[counted])


def _batches(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], recipe: Embedded
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each step token ids [batch, time] and the next tokens to predict, IGNORED outside the solution."""
    ids, starts, ends = _encoded(tokenizer, examples)
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(examples), generator=generator)
    size = recipe.warm_up_batch_size
    for step in range(recipe.warm_up_steps):
        rows = order[torch.arange(step * size, (step + 1) * size) % len(order)]
        width = int(ends[rows].max())
        batch = ids[rows, :width]
        made = torch.arange(1, width)
        solved = (made >= starts[rows, None]) & (made < ends[rows, None])
        yield batch[:, :-1], batch[:, 1:].masked_fill(~solved, IGNORED)


def _encoded(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [examples, longest] padded on the right, and where each solution starts and ends (after its eos)."""
    prompts = tokenizer([prompt for prompt, _ in examples])["input_ids"]
    solutions = tokenizer([f" {solution}" for _, solution in examples])["input_ids"]
    whole = [torch.tensor([*p, *s, tokenizer.eos_token_id]) for p, s in zip(prompts, solutions, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, torch.tensor([len(p) for p in prompts]), torch.tensor([len(w) for w in whole])
