"""A model's modules without its weights: enough to resolve what would be rounded, in milliseconds and no memory."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fp4rl.models.fit import require_ids_inside, require_unquantized
from fp4rl.models.load import load_tokenizer
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.mistakes import BadValue, NotThere
from fp4rl.spec.model import Embedded


def embedded_skeleton(recipe: Embedded) -> PreTrainedModel:
    """The embedded model before its warm-up."""
    return build(recipe, build_tokenizer())


def skeleton(path: str | Path) -> PreTrainedModel:
    """The modules of a Hugging Face folder on the meta device; its tokenizer is looked for as well.

    An adapter's folder gives its base model. Raises NotThere and BadValue as `load` does.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotThere(f"model folder {str(path)!r} does not exist; give a Hugging Face folder on this disk")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return skeleton(json.loads(adapter.read_text())["base_model_name_or_path"])
    if not (folder / "config.json").is_file():
        raise NotThere(f"model folder {str(folder)!r} has no config.json; is it a Hugging Face model folder?")
    require_unquantized(folder)
    tokenizer = load_tokenizer(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, AssertionError) as error:
        raise BadValue(f"the config.json in {str(folder)!r} cannot be read: {str(error).splitlines()[0]}") from None
    require_ids_inside(model, tokenizer, folder)
    return model
