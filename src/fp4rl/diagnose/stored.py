"""The weights of a checkpoint that need not fit into memory, scanned piece by piece from its files."""

from pathlib import Path

from fp4rl.diagnose.passes import Progress
from fp4rl.diagnose.precision import PartError, part_error, rounding_error
from fp4rl.diagnose.shards import StoredTensor, stored_tensors
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.models.skeleton import skeleton
from fp4rl.numerics.errors import ErrorSums
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.injection import Injection


def stored_weight_errors(
    folder: str | Path, injection: Injection, on_progress: Progress | None = None
) -> tuple[SiteTable, tuple[PartError, ...], dict[str, ErrorSums]]:
    """The site table of a checkpoint folder, its weights' errors and the sums behind them; the model is never loaded.

    Raises InvalidValueError for an adapter's folder (its weights are those of the base model), NotFoundError for a
    tensor that the files do not hold.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise InvalidValueError(f"{folder}: an adapter; scan it without --weights-only, or scan its base model")
    table = resolve(skeleton(folder), injection)
    stored = stored_tensors(folder)
    plans = [plan for plan in table.plans if plan.weight is not None and plan.site.kind == "linear"]
    found: dict[str, ErrorSums] = {}
    for done, plan in enumerate(plans, start=1):
        found[plan.name] = rounding_error(_tensor_of(plan, stored, folder).rows, plan, table)
        if on_progress is not None:
            on_progress(done, len(plans))
    return table, tuple(part_error(plan, "weight", found[plan.name]) for plan in plans), found


def _tensor_of(plan: SitePlan, stored: dict[str, StoredTensor], folder: str | Path) -> StoredTensor:
    name = f"{plan.name}.weight"
    if name not in stored:
        raise NotFoundError(f"{folder}: no tensor {name!r} in its safetensors files{nearest(name, stored)}")
    if plan.site.transposed:
        raise InvalidValueError(
            f"{folder}: {name} is stored [in, out], which is not read in pieces; scan without --weights-only"
        )
    if stored[name].shape != plan.site.shape:
        raise InvalidValueError(
            f"{folder}: {name} is {list(stored[name].shape)}, but config.json says {list(plan.site.shape)}"
        )
    return stored[name]
