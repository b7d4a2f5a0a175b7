"""What the trainer's policy computes with: the live model under its injection, called once, its operands by file name.

With the export this shares the rounding of one tensor and the table of sites, nothing else: the model is loaded whole,
`attach` rounds, and transformers itself splits and renames the parameters as it does when it saves a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from fp4rl.inject.adapted import AdaptedSum, adapter_of
from fp4rl.inject.attach import Attachment, attach
from fp4rl.inject.experts import StackState
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.models.load import load
from fp4rl.sites.walk import plain_name
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import ApplyDuring

_NOTHING = -1  # marks what belongs to no site


@dataclass(frozen=True)
class Trained:
    """A policy as it is evaluated. `computed` has what is computed with by names in memory, `values` by names in files.

    `plans` tells how those that are rounded are; `head` names the tensors that are the embedding too, which files may
    leave out.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    injection: Injection
    table: SiteTable = field(repr=False)
    computed: Mapping[str, Tensor] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    plans: Mapping[str, SitePlan] = field(repr=False)
    head: frozenset[str] = frozenset()

    @classmethod
    def of(cls, folder: Path, dtype: str, experts: Any, injection: Injection) -> "Trained":
        """Load a folder and run it once under `injection`; raises what `load` and `attach` do."""
        model: Any
        model, tokenizer = load(folder, dtype, experts)
        phases = ApplyDuring.model_validate(["evaluation"])
        judged = {"apply_during": phases, "frozen_base": "copy", "straight_through": "identity"}  # nothing is trained
        injection = injection.model_copy(update=judged)
        with attach(model, injection) as attachment, torch.no_grad():
            attachment.set_phase("evaluation")
            model(input_ids=prompt(model))
            attachment.require_calls()
            in_memory = _parameters(model)
            computed = in_memory | _copies(attachment)
        marks = _marks(attachment.table, in_memory)
        plans = {
            name: attachment.table.plans[number]
            for name, mark in _as_in_files(model, marks).items()
            if (number := int(mark.flatten()[0])) != _NOTHING
        }
        embedding = model.get_input_embeddings().weight
        head = {name for name, value in in_memory.items() if value.data_ptr() == embedding.data_ptr()}
        values = _as_in_files(model, computed)
        return cls(model, tokenizer, injection, attachment.table, computed, values, plans, frozenset(head))

    def masters(self) -> Mapping[str, Tensor]:
        """Return every tensor before rounding, by its name in the files."""
        return _as_in_files(self.model, _parameters(self.model))


def prompt(model: Any) -> Tensor:
    """Return token ids [1, 32] that any model has."""
    return torch.arange(1, 33).remainder(model.config.get_text_config().vocab_size).unsqueeze(0)


def _parameters(model: Any) -> dict[str, Tensor]:
    """Return the parameters by name, without adapters."""
    base = getattr(model, "get_base_model", lambda: model)()
    named = base.state_dict().items()
    return {plain_name(name): value.detach() for name, value in named if ".lora_" not in name}


def _copies(attachment: Attachment) -> dict[str, Tensor]:
    """Return the rounded copies that the matmuls of the last call had, by the names of their parameters."""
    copies = {}
    for plan in (plan for plan in attachment.table.plans if plan.weight is not None):
        state: Any = attachment.states[plan.name]
        adapter, module = adapter_of(attachment.model, plan.site), attachment.model.get_submodule(plan.site.path)
        if isinstance(state, StackState):
            weight: Any = module._parameters[str(plan.site.parameter)]
            copies[_parameter(plan)] = state.reads_as(weight, adapter)[0]
        else:
            copies[_parameter(plan)] = state.rounded_weight(AdaptedSum(adapter) if plan.merged else module)
    return copies


def _parameter(plan: SitePlan) -> str:
    return plan.name if plan.site.kind == "experts" else f"{plan.name}.weight"


def _marks(table: SiteTable, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors like the parameters, which take no memory, of the number of the plan that rounds each."""
    numbers = {_parameter(plan): number for number, plan in enumerate(table.plans) if plan.weight is not None}
    return {
        name: torch.tensor(numbers.get(name, _NOTHING)).expand(value.shape or (1,))
        for name, value in parameters.items()
    }


def _as_in_files(model: Any, in_memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    base = getattr(model, "get_base_model", lambda: model)()
    return dict(revert_weight_conversion(base, dict(in_memory)))
