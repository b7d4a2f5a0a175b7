"""A fresh LoRA adapter on a model: on layers of its text model alone, frozen below, saved with the path of its base."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from fp4rl.sites.modalities import other_modules, text_modules
from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.model import Lora


def with_lora(model: Any, lora: Lora, base: str | Path) -> Any:
    """Put a fresh LoRA adapter on linear layers of the text model in `model`, loaded from the folder `base`.

    The base is frozen, and only the adapter is saved, with the path of its base. Initial values come from torch's
    global generator. Raises InvalidValueError for a folder that holds an adapter already, and for modules that the
    model does not have.
    """
    from peft import LoraConfig, get_peft_model  # a run without an adapter needs no peft

    if (Path(base) / "adapter_config.json").is_file():
        raise InvalidValueError(f"{str(base)!r} holds an adapter already: drop model.lora to train that one on")
    _require_adaptable(model, lora)
    everywhere = lora.target_modules == ("all-linear",)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # typed int in peft, but a float works as well
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules="all-linear" if everywhere else list(lora.target_modules),
        exclude_modules=_not_adapted(model),
        target_parameters=list(lora.target_parameters) or None,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as why:
        cure = " (stacked experts take no dropout: set 0)" if lora.dropout and "ParamWrapper" in str(why) else ""
        raise InvalidValueError(f"model.lora: peft refuses it: {why}{cure}") from why
    adapted.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
    return adapted


def _not_adapted(model: nn.Module) -> str | None:
    """Return a pattern of what peft's names may cover and no adapter goes on: all but the text model, and Llama-4's
    router, a linear layer that returns a choice beside its product."""
    routers = (n for n, m in model.named_modules() if isinstance(m, nn.Linear) and hasattr(m, "top_k"))
    names = "|".join(map(re.escape, (*other_modules(model), *routers)))
    return rf"({names})(\..*)?" if names else None


def _require_adaptable(model: nn.Module, lora: Lora) -> None:
    """Raise InvalidValueError for a name in an adapter's description that the (text) model does not have."""
    text, wanted = text_modules(model), {*lora.target_modules} - {"all-linear"}
    layers = {n.rpartition(".")[2] for n, m in model.named_modules() if text is None or id(m) in text}
    for name in wanted - layers:
        kind = "" if text is None else " that text passes through"
        raise InvalidValueError(
            f"model.lora.target_modules: the model has no layer {name!r}{kind}{nearest(name, layers)}"
        )
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        stacks = [f"{name}.{own}" for own, weight in module.named_parameters(recurse=False) if weight.ndim == 3]
        if name in wanted and stacks:
            cure = f"name its parameters instead, model.lora.target_parameters: [{', '.join(stacks)}]"
            raise InvalidValueError(f"model.lora.target_modules: {path} holds stacked experts, no linear layer; {cure}")
    parameters = {re.sub(r"^.*?\.\d+\.", "", name) for name, _ in model.named_parameters()}
    for name in lora.target_parameters:
        if not any(f".{parameter}".endswith(f".{name}") for parameter in parameters):
            why = f"the model has no parameter {name!r}{nearest(name, parameters)}"
            raise InvalidValueError(f"model.lora.target_parameters: {why}")
