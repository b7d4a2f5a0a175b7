"""The checkpoint loaded as a model, by transformers where it can, and its logits held against the policy's."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from fp4rl.engines.checkpoints.export import ADAPTER
from fp4rl.engines.checkpoints.verify.checkpoint import Checkpoint
from fp4rl.engines.checkpoints.verify.findings import Check
from fp4rl.engines.checkpoints.verify.trained import Trained, prompt
from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.models.fit import keep_endings_alone
from fp4rl.models.load import load
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.retarget import under_deployment

_NO_WEIGHTS = {"weight": None}


@dataclass(frozen=True)
class Loaded:
    """The checkpoint as a model that computes in `dtype`, loaded `by` whom, with what rounds its inputs where it does
    not do so itself. `otherwise` says how it is not what the policy was trained with; None: every logit must be equal.
    """

    model: Any
    by: str
    dtype: str
    inputs: Injection | None = None
    otherwise: str | None = None

    def computing(self) -> AbstractContextManager[Any]:
        """Return a context in which `model` computes as the checkpoint is meant."""
        return evaluating(self.model, self.inputs)


@contextmanager
def evaluating(model: Any, injection: Injection | None) -> Iterator[None]:
    """Compute under an injection, if any, in its evaluation phase."""
    if injection is None:
        yield
        return
    with attach(model, injection) as attachment:
        attachment.set_phase("evaluation")
        yield


def compare_logits(check: Check, loaded: Loaded, policy: Any, injection: Injection | None) -> None:
    """Compare the logits of a fixed prompt; where the engine computes otherwise, note by how much they differ."""
    ids = prompt(policy)
    with torch.no_grad():
        with evaluating(policy, injection):
            expected = policy(input_ids=ids).logits.squeeze(0)
        with loaded.computing(), redirect_stderr(StringIO()):  # compressed-tensors decodes at the first call
            here = loaded.model(input_ids=ids).logits.squeeze(0)
    largest = float((here - expected).abs().max())
    check.notes.append(f"largest difference of logits: {largest:.3g} (loaded by {loaded.by}, in {loaded.dtype})")
    if loaded.otherwise is not None:
        check.notes.append(f"they need not be equal: {loaded.otherwise}")
    elif (wrong := check.compare("logits", here, expected)) is not None:
        check.explain("logits", here, expected, wrong, f"by up to {largest:.3g}")


def loaded(checkpoint: Checkpoint, trained: Trained, dtype: str, check: Check) -> Loaded | None:
    """Load by transformers what it loads, anything else by our reader; None, with a difference, where that fails."""
    method = (checkpoint.method or "plain weights").partition(" ")[0]
    if checkpoint.method is not None and method != "compressed-tensors":
        check.name = "our reader"
        check.notes.append(f"transformers loads no {method}: our own reader did, and no other engine computed with it")
        if any(plan.weight and plan.weight.scale == "e4m3" for plan in trained.plans.values()):
            dtype = trained.injection.dtype  # which NVFP4 values are rounded to, and are not themselves in another
        model = _with_adapter(load(checkpoint.folder, dtype)[0], checkpoint.folder / ADAPTER)
        return Loaded(model.eval(), "our reader", dtype, inputs_alone(trained.injection))
    dtype = dtype if checkpoint.method is None else "bfloat16"  # compressed-tensors decodes to that alone
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    base = getattr(trained.model, "get_base_model", lambda: trained.model)()
    how = {"attn_implementation": "eager" if dtype != "float32" else base.config._attn_implementation}
    how |= {"experts_implementation": base.config._experts_implementation}
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # bars of several libraries
            warnings.simplefilter("ignore")
            model, report = type(base).from_pretrained(
                checkpoint.folder, dtype=dtype, local_files_only=True, output_loading_info=True, **how
            )
            model = _with_adapter(model, checkpoint.folder / ADAPTER)
    except ImportError as error:  # no fault of the folder
        raise CheckFailed(f"transformers needs another library for this folder: {error}") from None
    except Exception as error:
        check.count(models=1)
        check.differs(str(checkpoint.folder), f"transformers cannot load it: {str(error).splitlines()[0]}", models=1)
        return None
    for keys, what in (("missing_keys", "finds no"), ("unexpected_keys", "has no place for")):
        for name in sorted(report[keys]):
            check.differs(name, f"transformers {what} such tensor, and goes on without it", tensors=1)
    keep_endings_alone(model, trained.tokenizer)
    otherwise = _otherwise(trained, dtype) if checkpoint.method else None
    return Loaded(model.eval(), "transformers", dtype, otherwise=otherwise)


def _with_adapter(model: Any, folder: Path) -> Any:
    if not folder.is_dir():
        return model
    from peft import PeftModel

    with torch.no_grad():
        model(input_ids=prompt(model))  # compressed-tensors decodes at the first call, and peft wants what it decoded
    return PeftModel.from_pretrained(model, folder)


def _otherwise(trained: Trained, dtype: str) -> str | None:
    """Return how the input rule of compressed-tensors' emulation differs from the one trained for; None if nowhere."""
    plans = trained.table.plans
    if not any(plan.input for plan in plans):
        return None
    if trained.injection.dtype != dtype:
        return f"inputs are rounded in {dtype}, those of the policy in {trained.injection.dtype}"
    if any(plan.input and plan.site.kind == "experts" for plan in plans):
        return "transformers leaves the inputs of experts as they are"
    if any(_inexact(plan.input) for plan in plans):
        return "compressed-tensors makes the scales of NVFP4 inputs in bfloat16"
    try:
        emulated = resolve(trained.model, under_deployment(trained.injection, "compressed_tensors")).plans
    except InvalidValueError:
        emulated = ()
    if [plan.input for plan in emulated] != [plan.input for plan in plans]:
        return f"transformers rounds inputs as compressed_tensors does, not as {trained.injection.deployment}"
    return None


def _inexact(fmt: Format | None) -> bool:
    """Return whether bfloat16 does not hold the factor of calibrated NVFP4 inputs."""
    if fmt is None or fmt.scale != "e4m3" or fmt.calibrated is None:
        return False
    factor = torch.tensor(448.0 * 6.0 / fmt.calibrated)
    return bool(factor.bfloat16().float() != factor)


def inputs_alone(injection: Injection) -> Injection | None:
    """Return the injection without its weights, which are rounded already; None where nothing is left of it."""
    exceptions = tuple(row.model_copy(update=_NO_WEIGHTS) for row in injection.by_pattern)
    inputs = injection.model_copy(update={"mode": None, "lora": "adapter", "by_pattern": exceptions, **_NO_WEIGHTS})
    return inputs if any(getattr(row, "input", None) for row in (inputs, *exceptions)) else None
