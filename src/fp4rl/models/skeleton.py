"""A model's modules without its weights: enough to resolve what would be rounded, in milliseconds and no memory."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fp4rl.models.fit import require_ids_inside, require_unquantized
from fp4rl.models.load import base_of, load_tokenizer
from fp4rl.models.readable import readable
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.model import Embedded


def embedded_skeleton(recipe: Embedded) -> PreTrainedModel:
    """The embedded model before its warm-up."""
    return build(recipe, build_tokenizer())


def skeleton(path: str | Path) -> PreTrainedModel:
    """The modules of a Hugging Face folder on the meta device; its tokenizer is looked for as well.

    An adapter's folder gives its base model. Raises NotFoundError and InvalidValueError as `load` does.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotFoundError(f"model folder {str(path)!r} does not exist; give a Hugging Face folder on this disk")
    base = base_of(folder)
    if base is not None:
        return skeleton(base)
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"model folder {str(folder)!r} has no config.json; is it a Hugging Face model folder?")
    require_unquantized(folder)
    tokenizer = load_tokenizer(folder)
    with readable("the config.json", folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    require_ids_inside(model, tokenizer, folder)
    return model
