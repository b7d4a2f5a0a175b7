"""Save a model into a folder that whatever opened the start's can open too."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fp4rl.models.load import base_of

# What a multimodal folder prepares pictures, videos and sounds with.
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def save(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    start: Path,
    experts: str | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Save a model, or its adapter, that came from the folder `start`, with its tokenizer and the start's processor.

    `experts`, how stacked experts are computed, is written into config.json, where `load` and transformers read it.
    `weights`: its state dict, where the model itself holds only parts of them.
    """
    model.save_pretrained(folder, state_dict=weights)
    if experts is not None:
        model.config.save_pretrained(folder)
        file = folder / "config.json"
        content = json.loads(file.read_text(encoding="utf-8")) | {"experts_implementation": experts}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    for name in PROCESSOR:
        sources = [source / name for source in (start, base_of(start)) if source is not None]
        if given := next((file for file in sources if file.is_file()), None):
            shutil.copyfile(given, folder / name)
