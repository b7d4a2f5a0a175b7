"""Checks that a run makes of itself: its quantizer works, its injection acted, nothing but training changed its master
weights, training did change them, and the live policy is the one that was saved.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.inject.attach import Attachment, attach, drawing_alike
from fp4rl.inject.evidence import master_digest
from fp4rl.inject.probe import require_rounded
from fp4rl.models.load import load
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.selftest import require_sound
from fp4rl.rl import processes
from fp4rl.rl.agreement import evidence_of_all
from fp4rl.rl.lora import with_lora
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.evidence import ActivePoints, Evidence, Injected, LiveCheck, MasterCheck, Rounded, WeightsMoved
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import Format
from fp4rl.spec.model import ExpertsImplementation, Lora, Model
from fp4rl.spec.points import Phase
from fp4rl.spec.records import Sites, Summary, read_sites

Record = Callable[[Evidence], None]

# Shares of changed weights below which a warning is due. FP32 masters need time to reach the next low-precision value.
_FEW, _HARDLY_ANY = 0.5, 0.05


def require_sound_quantizer() -> None:
    """Test the quantizer on the device of this process (0.02 s on a CPU). Raises CheckFailed for a broken backend."""
    device = processes.device()

    def quantize(x: Tensor, fmt: Format, generator: torch.Generator) -> Tensor:
        # Random numbers come from the test's own generator, which is on the CPU.
        where = torch.device("cpu") if fmt.rounding == "stochastic" else device
        return fake_quantize(x.to(where), fmt, generator=generator if where.type == "cpu" else None).cpu()

    require_sound(quantize)


def rounded(attachment: Attachment, step: int) -> Rounded:
    """Compare the operands of this phase's matmuls with their rounded masters. Raises CheckFailed where they differ."""
    return Rounded(phase=attachment.phase, sites=require_rounded(attachment), step=step)


@contextmanager
def weights_unchanged(
    model: nn.Module, phase: Phase, step: int, record: Record, profile: str | None = None
) -> Iterator[str]:
    """Hash the master weights before (yielded) and after, and record whether they changed; CheckFailed where one bit
    did."""
    before = master_digest(model)
    yield before
    unchanged = master_digest(model) == before
    line = MasterCheck(phase=phase, step=step, unchanged=unchanged, digest=before)
    record(line if profile is None else line.extended(profile=profile))
    if not unchanged:
        raise CheckFailed(f"step {step}: the master weights are not the same after {phase} as before it")


@torch.no_grad()
def share_changed(
    start: PreTrainedModel, trained: PreTrainedModel, record: Record, unclamped: Mapping[str, Tensor] | None = None
) -> float:
    """Record and return the share of the trainable weights of `trained` whose bits differ from those in `start`; of
    weights that are clamped into the model, what the optimizer updates counts, since a clamp alone learns nothing."""
    before = dict(start.named_parameters())
    changed = total = 0
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            new = (unclamped or {}).get(name, parameter)
            old, new = _whole(before[name]), _whole(new).to(parameter.dtype)
            changed += int((new != old.to(new.device, new.dtype)).sum())
            total += new.numel()
    share = changed / total
    record(WeightsMoved(trainable=total, changed=changed, share=share))
    return share


@torch.no_grad()
def weights_digest(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hash the names and bits of the trainable weights to twelve hex digits; equal digests are equal policies.

    `dtype`: of the copies that are hashed, where a model has masters of another.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = _whole(parameter).detach().to(dtype or parameter.dtype).contiguous().cpu()
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
            digest.update(whole.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _whole(parameter: Tensor) -> Tensor:
    """Gather a sharded parameter; any other is returned as it is."""
    return getattr(parameter, "full_tensor", parameter.detach)()


def without_update(steps: Collection[Mapping[str, float]]) -> int:
    """Count the steps that kept no group of answers, so that nothing was learned in them."""
    return sum(metrics.get("sampling/trained_groups") == 0 for metrics in steps)


def require_changed(share: float, steps: Collection[Mapping[str, float]], metric: str, dtype: str) -> None:
    """Raise CheckFailed, with the likeliest reason, for a training that changed no weight."""
    if share > 0:
        return
    if steps and without_update(steps) == len(steps):
        why = f"no step had a group of answers with spread in {metric} (training.filter_groups.metric, training.reward)"
    elif all(not metrics.get("grad_norm") for metrics in steps):
        why = "every gradient was 0: the answers of no group differ in their reward"
    else:
        why = f"no update reached half a step of {dtype}; raise training.lr"
    raise CheckFailed(f"training changed none of the weights: {why}")


def few_changed(share: float, model: Model) -> str | None:
    """Return a line where most updates were lost in the low precision of the masters; None where they were not."""
    enough = _FEW if model.coarse_masters else _HARDLY_ANY
    if model.dtype == "float32" or model.lora is not None or share >= enough:
        return None
    cure = "model.master_dtype: float32" if model.coarse_masters else "more steps"
    return (
        f"training changed {share:.2%} of the weights: most updates were smaller than half a step of {model.dtype}; "
        f"take {cure}, or a larger training.lr"
    )


def sites(attachment: Attachment | None) -> Sites:
    """Return the resolved table; empty where nothing is injected."""
    return Sites(digest=None, plans=(), left_out=()) if attachment is None else read_sites(attachment.table.as_dict())


def verify_final(
    experiment: Experiment, model: PreTrainedModel, attachment: Attachment | None, final: Path, record: Record
) -> Summary:
    """Return the summary; details go to `record`. Raises CheckFailed when the live policy is not the one in `final`."""
    rows, of_each = evidence_of_all(attachment) if attachment is not None else ([], [])
    if attachment is not None:
        record(ActivePoints(phase="rollout", points=attachment.table.active_sites("rollout")))
        record(ActivePoints(phase="training", points=attachment.table.active_sites("training")))
    for row in rows:
        record(row)
    difference = _live_against_fresh(experiment, model, attachment, final)
    record(LiveCheck(max_difference=difference))
    if difference != 0.0:
        raise CheckFailed(
            f"the live policy's logits differ from those of its saved copy by up to {difference:g}: "
            "rounded weights went stale"
        )
    acting_sites = len(attachment.table.plans) if attachment is not None else 0
    summary = Summary(sites=acting_sites, calls=_calls(rows), live_equals_fresh=True, masters_unchanged=True)
    return summary if len(of_each) < 2 else summary.extended(calls_by_process=tuple(map(_calls, of_each)))


def _calls(rows: Collection[Injected]) -> dict[str, int]:
    """Return the calls by phase of all sites and points together."""
    calls: Counter[str] = Counter()
    for row in rows:
        calls[row.phase] += row.calls
    return dict(calls)


def require_verifiable(
    experiment: Experiment, model: PreTrainedModel, attachment: Attachment | None, start: Path
) -> None:
    """Check before training that the live policy equals its start, so that the comparison at the end can be made.

    The attachment's random state and evidence are left as they were. Raises CheckFailed.
    """
    before = attachment.state_dict() if attachment is not None else {}
    difference = _live_against_fresh(experiment, model, attachment, start)
    if attachment is not None:
        attachment.set_phase("training")
        attachment.load_state_dict(before)
    if difference != 0.0:
        raise CheckFailed(
            f"before any training the policy's logits differ from those of a fresh copy, injected alike, by up to "
            f"{difference:g}: something in the evaluation phase cannot be repeated, so that no run could prove what it "
            "saved; leave it out there (injection.apply_during)"
        )


@torch.no_grad()
def _live_against_fresh(
    experiment: Experiment, model: PreTrainedModel, attachment: Attachment | None, folder: Path
) -> float:
    """Return the largest difference between the live policy's logits and those of the model in `folder`, under the same
    injection and random numbers."""
    spec = experiment.model
    fresh, _ = load_saved(folder, spec.dtype, spec.lora, spec.experts_implementation)
    device = next(model.parameters()).device
    ids = torch.arange(1, 33, device=device).remainder(model.config.get_text_config().vocab_size).unsqueeze(0)
    model.eval()
    if attachment is None or experiment.injection is None:
        return _difference(model, fresh, ids)
    attachment.set_phase("evaluation")
    with attach(fresh, experiment.injection) as other:
        other.set_phase("evaluation")
        with drawing_alike(attachment, other):
            return _difference(model, fresh, ids)


def load_saved(
    folder: Path, dtype: str, lora: Lora | None, experts: ExpertsImplementation | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer; with `lora` a folder without an adapter gets a fresh one, which changes no number."""
    model, tokenizer = load(folder, dtype, experts)
    if lora is not None and not (folder / "adapter_config.json").is_file():
        with torch.random.fork_rng():
            model = with_lora(model, lora, folder).eval()
    return model.to(processes.device()), tokenizer


def _difference(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    return float((model(input_ids=ids).logits - other(input_ids=ids).logits).abs().max())
