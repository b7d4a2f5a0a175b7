"""What a model folder must be before anything is measured on it: unquantized, and one with its tokenizer."""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fp4rl.spec.errors import InvalidValueError

# Where tools say that they have quantized a checkpoint: transformers and most others, llm-compressor of old.
_IN_CONFIG = ("quantization_config", "compression_config")
# Files of their own: NVIDIA ModelOpt, AutoGPTQ, AutoAWQ and MindStudio (Ascend).
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quant_model_description.json")


def require_unquantized(folder: Path) -> None:
    """Raise InvalidValueError, naming the method, for a folder whose weights are quantized already.

    Their rounding cannot be undone: its `full` would be another model than the one that it was made from.
    """
    method = _quantized_by(folder)
    if method is not None:
        raise InvalidValueError(
            f"the model in {str(folder)!r} is quantized already ({method}): its weights hold that rounding for good; "
            "give the unquantized folder that it was made from"
        )


def _quantized_by(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads the configuration says what is wrong with it
    for part in (config, *(config.get(name) for name in ("text_config", "llm_config"))) if _is(config) else ():
        for key in _IN_CONFIG:
            if _is(part) and part.get(key):
                return f"{key}: {_method(part[key])}"
    return next((name for name in _FILES if (folder / name).is_file()), None)


def _is(part: Any) -> bool:
    return isinstance(part, dict)


def _method(function: Any) -> str:
    names = [function.get(key) for key in ("quant_method", "quant_algo", "format")] if _is(function) else []
    return next((str(name) for name in names if name), "of a kind that it does not name")


def require_bare_texts(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise InvalidValueError for a tokenizer that ends every text, or begins it twice: a prompt has to be open at its
    end."""
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
    """Raise InvalidValueError for a token that pads, ends or opens every text and has no row in the model's
    embedding."""
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
