"""Checks of the model from its configuration alone, on the meta device: its start, its sites, its noise."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from fp4rl.inject.plan import SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.lab.preflight.data import is_missing, without_tokenizer
from fp4rl.lab.preflight.rows import Check, Row, Subject, merged, of_arms
from fp4rl.lab.serving import unserved
from fp4rl.lab.stages import stages_of
from fp4rl.models.load import embedded_skeleton, skeleton
from fp4rl.models.packed.as_served import packed_at
from fp4rl.models.packed.folder import IN_CONFIG
from fp4rl.noise.targets import noisy_weights
from fp4rl.rl.check import check
from fp4rl.rl.lora import with_lora
from fp4rl.sites.walk import is_conv1d, walk
from fp4rl.spec.errors import UserError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import E2M1, Format
from fp4rl.spec.linked import links
from fp4rl.spec.model import Embedded, Model
from fp4rl.spec.words import counted

_NEVER = ("router", "embedding", "adapter")  # kinds that nothing rounds or puts noise on unless it is opted in
Look = Callable[[Experiment, Any], Iterator[Row]]


@lru_cache(maxsize=4)
def modules_of(model: Model) -> Any:
    """Return the modules of a model without its weights, with the adapter that its description puts on it."""
    if model.path is None:
        bare = embedded_skeleton(model.embedded or Embedded())
    else:
        bare = skeleton(model.path, model.experts_implementation, tokenizer=False)
    return bare if model.lora is None else with_lora(bare, model.lora, model.path or "")


def _of_models(look: Look) -> Callable[[Subject], Iterator[Row]]:
    def here(subject: Subject) -> dict[str, Experiment]:
        return {arm: own for arm, own in subject.arms.items() if not is_missing(own.model)}

    return of_arms(here, lambda own: look(own, modules_of(own.model)))


def _table(experiment: Experiment, model: Any) -> SiteTable | None:
    return resolve(model, experiment.injection) if experiment.injection is not None else None


def sites(experiment: Experiment, model: Any) -> Iterator[Row]:
    """Find every linear layer: rounded, or left with a reason, none twice, and none that nobody may round."""
    table = _table(experiment, model)
    if table is None or not table.plans:
        return
    expected = "each linear layer rounded once, or left for a reason"
    known = (*(plan.site for plan in table.plans), *(left.site for left in table.left_out))
    accounted = {path for site in known for path in site.places}
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)}
    if missed := sorted(linear - accounted):
        measured = f"{counted(len(missed), 'linear layer')} neither rounded nor left, such as {missed[0]}"
        yield Row("fail", measured, expected, "report it: a fault of fp4rl")
    places = [(plan.site.path, plan.site.parameter) for plan in table.plans if plan.site.parameter is not None]
    held = Counter(id(getattr(model.get_submodule(path), name, None)) for path, name in places)
    if twice := sum(count - 1 for count in held.values()):
        yield Row("fail", f"{counted(twice, 'weight')} rounded more than once", expected, "leave one of its places")
    per_layer = Counter(plan.site.layer for plan in table.plans)
    each = sorted({str(number) for layer, number in per_layer.items() if layer is not None})
    measured = f"{counted(len(table.plans), 'site')}, {' or '.join(each)} in each of {counted(len(per_layer), 'layer')}"
    opted = table.injection.targets.opt_in
    wrong = [plan.name for plan in table.plans if _forbidden(plan.site) and _forbidden(plan.site) not in opted]
    if wrong:
        cure = "targets.leave, or targets.opt_in where it is meant"
        measured = f"{counted(len(wrong), 'site')} rounded that nobody asked for, such as {wrong[0]}"
        yield Row("fail", measured, expected, cure)
    elif not missed and not twice:
        yield Row("pass", f"{measured}; {len(table.left_out)} left", expected)


def _forbidden(site: Any) -> str | None:
    return "lm_head" if site.role == "lm_head" else site.kind if site.kind in _NEVER else None


def fused(experiment: Experiment, model: Any) -> Iterator[Row]:
    """Hold the formats of every group that a serving kernel fuses (q, k, v; gate, up) against each other."""
    groups: dict[str, set[Any]] = defaultdict(set)
    table = _table(experiment, model)
    for plan in table.plans if table is not None else ():
        if plan.site.fused_group is not None:
            groups[plan.site.fused_group].add((plan.weight, plan.input))
    split = [group for group, formats in groups.items() if len(formats) > 1]
    expected = "one format and one factor in a group"
    own = [name for name, formats in groups.items() if any(_factor_of_its_own(weight) for weight, _ in formats)]
    if split:
        cure = "one format for all of it, or injection.fused_groups: free"
        yield Row("warn", f"{counted(len(split), 'group')} with several, such as {split[0]}", expected, cure)
    elif own:
        measured = f"each weight has a factor of its own in {counted(len(own), 'group')}, such as {own[0]}"
        yield Row("warn", measured, expected, "weight: {name: nvfp4, factor: fused}, or a mode, which has it")
    elif groups:
        yield Row("pass", f"{counted(len(groups), 'group')} of fused layers, each alike", expected)


def _factor_of_its_own(fmt: Format | None) -> bool:
    return fmt is not None and fmt.scale == "e4m3" and fmt.factor == "tensor"


def experts(experiment: Experiment, model: Any) -> Iterator[Row]:
    """Look at the layout of stacked experts, and whether a router is among what is rounded."""
    stacks = [site for site in walk(model) if site.kind == "experts"]
    table = _table(experiment, model)
    if not stacks or table is None:
        return
    expected = "a layout that sizes tell, no router rounded"
    square = [site.name for site in stacks if site.transposed is None]
    routers = [plan.name for plan in table.plans if plan.site.kind == "router"]
    measured = f"{counted(len(stacks), 'stack')} of experts, {counted(len(routers), 'router')} rounded"
    if routers and "router" not in table.injection.targets.opt_in:
        yield Row("fail", f"{measured}, such as {routers[0]}", expected, "targets.leave: ['*router*', '*.gate']")
    elif square:
        measured += f"; the layout of {square[0]} shows in its first product alone"
        yield Row("warn", measured, expected, "its first step stops where it is the other one")
    else:
        yield Row("pass", measured, expected)


def widths(experiment: Experiment, model: Any) -> Iterator[Row]:
    """Look for layers that the deployment has no kernel for, by their in_features."""
    table = _table(experiment, model)
    four = [plan for plan in (table.plans if table else ()) if plan.weight is not None and plan.weight.element == E2M1]
    if table is None or table.injection.deployment is None or not four:
        return
    shapes = [(plan.name, plan.site.part, plan.site.shape[-1]) for plan in four]
    lacking, expected = [*unserved(table.injection, shapes)], "a kernel for every width"
    for line in lacking:
        yield Row("warn", line, expected, "leave these layers, or take another mode or deployment")
    if not lacking:
        inputs = ", ".join(str(width) for width in sorted({width for _, _, width in shapes}))
        yield Row("pass", f"in_features {inputs}", expected)


def noisy(experiment: Experiment, model: Any) -> Iterator[Row]:
    """Name the weights that take noise: none of a router, an embedding, the head or an adapter."""
    if experiment.noise is None:
        return
    weights = noisy_weights(model, experiment.noise, share=0.0)
    never = {site.name: what for site in walk(model) if (what := _forbidden(site))}
    wrong = [weight.name for weight in weights if weight.name.removesuffix(".weight") in never]
    layers = len({weight.layer for weight in weights if weight.layer is not None})
    measured = f"{counted(len(weights), 'weight')} in {counted(layers, 'layer')} take noise"
    expected = "no router, embedding, head or adapter among them"
    if wrong:
        cure = f"noise.targets.leave: ['{wrong[0]}']"
        yield Row("fail", f"{measured}, {wrong[0]} among them", expected, cure)
    else:
        yield Row("pass", measured, expected)


def fits(subject: Subject) -> Iterator[Row]:
    """Check what a run checks before it begins: rewards, prompts, positions, profiles, patterns, teachers."""
    yield from merged((run.arm, _fits(run, subject)) for run in subject.firsts)


def _fits(run: Any, subject: Subject) -> Row:
    experiment, expected = run.experiment, "all that a run checks before it begins"
    if (why := without_tokenizer(experiment.model)) is not None:
        return Row("waits", why, expected)
    try:
        stages = stages_of(run, subject.root)
    except UserError as error:
        if not links(experiment):
            raise
        return Row("waits", str(error), expected)
    try:
        check(experiment, stages)
    except UserError as error:
        return Row("fail", str(error), expected)
    recipe = experiment.training
    longest = f"prompts within {recipe.max_prompt_length} tokens, answers within {recipe.max_response_length}"
    return Row("pass", f"{longest}; profiles and patterns fit", expected)


def start(subject: Subject) -> Iterator[Row]:
    """Look for a quantization in each start's folder: an engine that reads it rounds an arm that rounds nothing."""
    yield from merged((arm, row) for arm, own in subject.arms.items() for row in _start(own))


def _start(experiment: Experiment) -> Iterator[Row]:
    if experiment.model.path is None or is_missing(experiment.model):
        return
    folder, expected = Path(experiment.model.path), "unrounded weights in an unrounded arm"
    packed = packed_at(folder) if any(folder.glob("*.safetensors")) else None
    method = packed.method if packed is not None else _named_in(folder)
    if method is None:
        yield Row("pass", "nothing in the start's folder says that it is quantized", expected)
    elif experiment.injection is None or not experiment.injection.formats_at("weight"):
        measured = (
            f"the start is packed ({method}): an engine that reads its folder rounds this arm, which rounds nothing"
        )
        yield Row("warn", measured, expected, "start from the folder that it was packed from")
    else:
        yield Row("warn", f"the start is packed ({method}): its weights lie on that grid already", expected)


def _named_in(folder: Path) -> str | None:
    """Return the method of quantization that a configuration names, where there are no weights that could be read."""
    config = folder / "config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    tables = [table for key in IN_CONFIG if isinstance(table := said.get(key), dict)]
    return str(tables[0].get("quant_method", "a method without a name")) if tables else None


CHECKS = (
    Check("start", ("P43",), start),
    Check("fits", ("P11", "P28", "P47"), fits),
    Check("sites", ("P11",), _of_models(sites)),
    Check("fused", ("P41",), _of_models(fused)),
    Check("experts", ("P44",), _of_models(experts)),
    Check("widths", ("P45",), _of_models(widths)),
    Check("noisy", ("P31", "P03"), _of_models(noisy)),
)
