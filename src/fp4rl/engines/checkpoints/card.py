"""The model card of an export: what it is, how it was judged, and what it will be served as."""

from collections import Counter
from collections.abc import Iterator

from fp4rl.engines.checkpoints.exported import Exported
from fp4rl.lab.statistics.proportions import wilson
from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.formats import Format, describe
from fp4rl.spec.words import counted


def card(exported: Exported) -> str:
    """Return the card as Markdown."""
    injection = exported.policy.injection
    mode = injection.checkpoint_mode or "mixed"
    tags = ["fp4rl", mode, exported.layout.name]
    head = ["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in tags), "---"]
    title = f"# {exported.source.name}, {mode.upper()} as {exported.layout.name}"
    return "\n".join([*head, "", title, "", *_lines(exported)]) + "\n"


def _lines(exported: Exported) -> Iterator[str]:
    source, policy = exported.source, exported.policy
    for line in exported.overridden:
        yield f"> **Written all the same (`--anyway`):** {line}\n"
    if source.run is not None:
        result = source.run.result
        digests = f"spec {result.spec_digest}, code {result.code_digest}"
        yield f"- Run `{source.run.key}`: {digests}, {result.steps_done} steps"
        gaps = "; ".join(source.run.gaps)
        yield f"- Evidence: {f'missing: {gaps}' if gaps else 'complete, everything that was described acted'}"
        for evaluation in source.judged(policy.table):
            yield f"- {_accuracy(evaluation)}"
    else:
        yield f"- Made from the model folder `{source.name}`; it was not evaluated"
    cast = f"values were cast to {policy.injection.dtype} before they were rounded"
    yield f"- Weights: {_formats(exported)}, {exported.bits:.2f} bits a value; {cast}"
    yield f"- Inputs of matmuls: {_inputs(exported)}"
    yield f"- Served: {exported.layout.served(policy)}"
    for note in exported.layout.notes(policy):
        yield f"- Note: {note}"
    deployment = DEPLOYMENTS.get(policy.injection.deployment or "")
    if deployment is not None:
        packer, kernel = deployment.packer, deployment.kernel
        yield f"- Packer {packer.name} ({packer.checked}), kernel {kernel.name} ({kernel.checked})"
    left = [entry.module for entry in policy.entries if entry.weight is None and len(entry.stored.shape) == 2]
    yield f"- Not rounded: {', '.join(left)}"
    if policy.injection.kv_cache is not None:
        yield f"- The KV cache was rounded to {_words(policy.injection.kv_cache)}, which is a setting of the engine"
    yield ""
    yield "`fp4rl verify` of this folder compares every value with what was trained."


def _accuracy(evaluation: Evaluation) -> str:
    n = evaluation.problems or evaluation.n or 1
    low, high = (100 * share for share in wilson(round(evaluation.strict * n), n))
    what = f"Accuracy as {evaluation.profile.name} ({evaluation.profile.precision}), {counted(n, 'problem')}"
    return f"{what}: **{100 * evaluation.strict:.1f} %** [{low:.1f}, {high:.1f}]"


def _formats(exported: Exported) -> str:
    counts = Counter(_words(entry.weight) for entry in exported.policy.rounded)
    return ", ".join(f"{counted(count, 'tensor')} {words}" for words, count in counts.items())


def _inputs(exported: Exported) -> str:
    formats = dict.fromkeys(_words(entry.input) for entry in exported.policy.rounded)
    return "as they are" if list(formats) == ["none"] else f"{', '.join(formats)}, to be rounded by the engine"


def _words(fmt: Format | None) -> str:
    """Return a format as `mxfp4 (scale_rule even, rounding half_away)`, without what each layer has of its own."""
    described = describe(fmt) if fmt else "none"
    if isinstance(described, str):
        return described
    described.pop("calibrated", None)
    return f"{described.pop('name')} ({', '.join(f'{key} {value}' for key, value in described.items())})"
