"""Checks of a model folder before anything is measured on it: readable, with a tokenizer that fits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.spec.errors import InvalidValueError, UserError


@contextmanager
def readable(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever other libraries raise over a file into InvalidValueError, with the folder and the cure."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as why:  # a parser in Rust panics with an exception of its own beside `Exception`
        reason = (str(why).strip().splitlines() or [type(why).__name__])[0]
        raise InvalidValueError(f"{what} in {str(folder)!r} cannot be read: {reason}{_cure(folder)}") from why


def _cure(folder: Path) -> str:
    """Return the cure; files of pickled weights are read without running code, which not all of them allow."""
    if (joining := joining_shards(folder)) is not None:
        return f"; verl's ranks have each left a part of the weights: `{joining}` joins them, in bfloat16"
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        return "; its weights are in .bin files: save them as safetensors (save_pretrained does), or copy them anew"
    return ""


def joining_shards(folder: Path) -> str | None:
    """Return the command that joins what the ranks of a verl run saved, in a folder or beside it; None where nothing
    of that kind is there."""
    for actor in (folder, folder.parent):
        if any(actor.glob("model_world_size_*_rank_*.pt")):
            return f"python -m verl.model_merger merge --backend fsdp --local_dir {actor} --target_dir MERGED"
    return None


def require_bare_texts(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise InvalidValueError for a tokenizer that closes every prompt with an end token, or begins it twice."""
    ids = list(tokenizer("a")["input_ids"])
    ending = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None]
    if len(ids) > 1 and ids[-1] in ending:
        raise InvalidValueError(
            f"the tokenizer in {str(folder)!r} ends every text with {tokenizer.decode(ids[-1:])!r}, so that a prompt "
            "is over before it is answered; save it again with add_eos_token=False"
        )
    if len(ids) > 2 and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise InvalidValueError(
            f"the tokenizer in {str(folder)!r} begins every text with {tokenizer.bos_token!r} twice; save it again "
            "with add_bos_token=False, or without the second one in its post-processor"
        )


def require_ids_inside(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise InvalidValueError for a token that pads, ends or opens every text and has no row in the embedding."""
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    used = {"pad_token": tokenizer.pad_token_id, "eos_token": tokenizer.eos_token_id}
    if tokenizer.bos_token_id in tokenizer("a")["input_ids"]:
        used["bos_token"] = tokenizer.bos_token_id
    for name, number in used.items():
        if number is not None and number >= rows:
            raise InvalidValueError(
                f"{name} {tokenizer.decode([number])!r} of the tokenizer in {str(folder)!r} is token {number}, but the "
                f"model's embedding ends at {rows - 1}: take a {name} inside it, or call "
                f"model.resize_token_embeddings({number + 1}), and save both again"
            )


def keep_endings_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop the model's own generation settings, except the tokens that end an answer; add the tokenizer's.

    Engines stop at these tokens. transformers takes every setting that a caller leaves open from
    `generation_config.json`: a repetition penalty there would change "greedy" answers, and the sampler would no longer
    be the policy that is trained.
    """
    own = model.generation_config.eos_token_id
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
    )


def end_ids(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end an answer, in training and in evaluations; InvalidValueError where there are none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise InvalidValueError("no token ends an answer: set eos_token in the model's tokenizer and save it again")
    return [ends] if isinstance(ends, int) else list(ends)
