"""What of a multimodal model computes text, and what sees or hears: training and rounding keep to the text."""

from typing import Any

from torch import nn


def text_modules(model: Any) -> set[int] | None:
    """Return the modules, by `id`, that compute text in a multimodal model; None for a model of text alone."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return None
    head = model.get_output_embeddings()
    return {id(model), id(head), *(id(module) for module in model.get_decoder().modules())}


def other_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the towers that no text passes through, each without the modules below it."""
    text = text_modules(model)
    if text is None:
        return ()
    named = dict(model.named_modules())
    paths = [name.split(".") for name, module in named.items() if id(module) in text]
    around = {".".join(path[:depth]) for path in paths for depth in range(len(path) + 1)}
    return tuple(name for name in named if name not in around and name.rpartition(".")[0] in around)


def freeze_other_modules(model: nn.Module) -> None:
    """Take from training whatever no text passes through: it would get no gradient, but masters and decay."""
    text = text_modules(model)
    if text is not None:
        read = (m.parameters(recurse=False) for m in model.modules() if id(m) in text)
        kept = {id(parameter) for parameters in read for parameter in parameters}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
