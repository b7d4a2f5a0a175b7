"""What ends an answer of a model, and that nothing else of its folder's generation settings reaches a generation.

transformers fills whatever a caller leaves open from the folder's `generation_config.json`: a repetition penalty there
would change "greedy" answers, and the sampler of a training would no longer be the policy that is trained.
"""

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.spec.errors import InvalidValueError


def keep_endings_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of the model's own generation settings only the tokens that end an answer stay, and the tokenizer's own.

    They are what an engine stops at, so they belong to the model; a folder saved from it says the same.
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
    """The tokens that end an answer, in training and in every evaluation. Raises InvalidValueError where there are
    none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise InvalidValueError(
            "no token ends an answer of this model: set eos_token in its tokenizer and save it again"
        )
    return [ends] if isinstance(ends, int) else list(ends)
