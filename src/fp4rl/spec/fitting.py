"""Numbers that hang on the model where nobody names them: what fits the small embedded model ruins a real one."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from fp4rl.spec.training import Training

# Learning rates: the embedded model's was found by trying; 1e-6 is what GRPO's and DAPO's papers train with, and
# adapters take about ten times the rate of whole weights.
_EMBEDDED = {"lr": 4e-4, "max_response_length": 48}
_ADAPTER = {"lr": 1e-5}


def with_fitting_numbers(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` of an experiment, as it is before it is checked, with the keys that fit its model where none is named:
    `training.lr`, `training.max_response_length`, and as long an answer in evaluations as in training."""
    model = _named(content.get("model") or {})
    if isinstance(model, str):
        model = {} if model == "embedded" else {"path": model}
    training, evaluation = _named(content.get("training", {})), _named(content.get("evaluation", {}))
    if not (isinstance(model, Mapping) and isinstance(training, Mapping) and isinstance(evaluation, Mapping)):
        return dict(content)  # what is wrong with it is said where it is checked
    fitting = _EMBEDDED if not model.get("path") else _ADAPTER if model.get("lora") is not None else {}
    training = {**fitting, **training}
    longest = training.get("max_response_length", Training.model_fields["max_response_length"].default)
    return {**content, "training": training, "evaluation": {"max_new_tokens": longest, **evaluation}}


def _named(part: Any) -> Any:
    """A description as the keys that were named in it."""
    return part.model_dump(exclude_unset=True) if isinstance(part, BaseModel) else part
