"""Modules that are put into a model, or taken out, while it carries an injection: noticed at its next forward.

What leaves every site what it was goes on: wrapping by FSDP, adapters beside rounded layers. A replaced layer would not
be rounded, a module to be saved whole would be a copy, a merge would take rounded sums away: refused.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import nn

from fp4rl.inject.adapted import adapter_of
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.inject.site import runs_its_class
from fp4rl.sites.walk import Site, plain_name, walk
from fp4rl.spec.errors import InvalidValueError


class SurgeryCheck:
    """A forward hook that raises InvalidValueError, naming a site, where `model` is not what the table was made for."""

    def __init__(self, model: nn.Module, table: SiteTable) -> None:
        self.model, self.table = model, table
        self.injected = {plan.name: _swapped(model, plan, plan.site) for plan in table.plans}
        self._adapted = {plan.name for plan in table.plans if adapter_of(model, plan.site) is not None}
        self._held = [module.__dict__ for module in self.injected.values()]
        self._checked = False  # in this forward, by the hook on the whole model
        self._remember()

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Compare who is whose child, once a forward; look closer only where that has changed."""
        whole = module is self.model
        checked, self._checked = self._checked and not whole, whole
        if checked or torch.compiler.is_compiling():
            return
        same = not any(self._childless) and all([*now.values()] == then for now, then in self._children)
        if same and not any(map(dict.__contains__, self._held, repeat("forward"))):
            return
        for name, what in self._changes(same):
            raise InvalidValueError(
                f"{name} {what} after the injection was attached; call remove() on the attachment before such a "
                "change, and attach again after it"
            )
        self._remember()

    def _changes(self, same: bool) -> Iterator[tuple[str, str]]:
        for name, module in self.injected.items():
            if not runs_its_class(module):
                yield name, "was given a forward of its own"
        if same or self._named == _named(self.model):  # wrapped, as by FSDP: the same modules under the same names
            return
        sites = {site.name: site for site in walk(self.model)}
        for plan in self.table.plans:
            now = sites.pop(plan.name, None)
            adapted = now is not None and adapter_of(self.model, now) is not None
            matters = plan.merged or plan.site.kind == "experts" or self.table.injection.lora == "merged"
            if now is None or now.kind != plan.site.kind:
                yield plan.name, "was taken out of the model"
            elif matters and adapted != (plan.name in self._adapted):
                yield plan.name, "was given an adapter" if adapted else "lost its adapter"
            elif _swapped(self.model, plan, now) is not self.injected[plan.name]:
                yield plan.name, f"was replaced by another {type(self.model.get_submodule(now.path)).__name__}"
        known = {left.site.name for left in self.table.left_out}
        new = (site for site in sites.values() if site.kind in ("linear", "experts", "attention"))
        yield from ((site.name, "was put into the model") for site in new if site.name not in known)

    def _remember(self) -> None:
        below = [module._modules for module in self.model.modules()]
        self._childless = [modules for modules in below if not modules]
        self._children = [(modules, [*modules.values()]) for modules in below if modules]
        self._named = _named(self.model)


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules by their plain names; of a wrapper and what it wraps, which share one, the latter."""
    return {plain_name(path): module for path, module in model.named_modules(remove_duplicate=False)}


def _swapped(model: nn.Module, plan: SitePlan, site: Site) -> nn.Module:
    """Return the module whose class a plan swaps: the site's own, or the adapted layer around it."""
    adapter: nn.Module | None = adapter_of(model, site) if plan.merged and site.kind == "linear" else None
    return model.get_submodule(site.path) if adapter is None else adapter


def checked_modules(model: nn.Module, table: SiteTable) -> list[nn.Module]:
    """Return the modules whose forward every use of the model passes through: itself, and what holds its layers.

    Where adapters are merged, or a model is wrapped into another, only the inner one is called.
    """
    layered = {
        plan.site.path.partition(f".{plan.site.layer}.")[0] for plan in table.plans if plan.site.layer is not None
    }
    chain = [model.get_submodule(path.rpartition(".")[0]) for path in layered]  # what holds the list of layers
    return list(dict.fromkeys([model, *chain]))
