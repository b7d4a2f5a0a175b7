"""Build a model of transformers from packed weights, each decoded when it is put in: no second copy of the model."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.auto.auto_factory import _get_model_class

from fp4rl.models.packed.folder import PackedFolder
from fp4rl.models.packed.weight import Stored, StoredWeight
from fp4rl.spec.errors import InvalidValueError


class _Values:
    """What stands for a tensor until transformers takes its values, as it takes those of files: by `[...]`."""

    def __init__(self, stored: Stored, dtype: torch.dtype, failures: list[Exception]) -> None:
        self.stored, self.dtype, self.failures = stored, dtype, failures

    def __getitem__(self, _: object) -> Tensor:
        try:
            stored = self.stored
            return stored.values(self.dtype) if isinstance(stored, StoredWeight) else stored.read()
        except Exception as why:  # transformers gathers errors and says that there were some
            self.failures.append(why)
            raise


def decoded_into(auto: Any, config: Any, packed: PackedFolder, how: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model of the class that `auto` picks, loaded with the settings `how`, and transformers' report.

    Conversions of names and shapes, such as the stacking of experts, are transformers' own. Raises InvalidValueError
    for tensors that have no place in the model: scales of another layout, for example.
    """
    failures: list[Exception] = []
    tensors = {name: _Values(stored, how["dtype"], failures) for name, stored in packed.tensors.items()}
    own = next(name for name in ("generation_config.json", "config.json") if (packed.path / name).is_file())
    generation = GenerationConfig.from_pretrained(packed.path, config_file_name=own, local_files_only=True)
    try:
        kind = _get_model_class(config, auto._model_mapping)
        how = {**how, "config": config, "generation_config": generation}
        model, report = kind.from_pretrained(None, state_dict=tensors, **how)
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    if unexpected := sorted(report["unexpected_keys"]):
        raise InvalidValueError(
            f"{packed.path}: the model has no place for {len(unexpected)} tensors ({unexpected[0]!r}), so it would not "
            "be the one that was packed"
        )
    model.config.name_or_path = model.name_or_path = str(packed.path)  # as from_pretrained notes it
    return model, report
