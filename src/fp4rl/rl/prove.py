"""What a finished training proves of itself: which sites acted, and that the live policy is the one that was saved."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fp4rl.inject.attach import Attachment, attach, drawing_alike
from fp4rl.models.load import load, with_lora
from fp4rl.rl.acting import acting
from fp4rl.rl.weights_unchanged import Record
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.evidence import LiveCheck
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.records import Sites, Summary, read_sites


def sites(attachment: Attachment | None) -> Sites:
    """The resolved table; empty where nothing is injected."""
    return Sites(digest=None, plans=(), left_out=()) if attachment is None else read_sites(attachment.table.as_dict())


def proved(
    experiment: Experiment, model: PreTrainedModel, attachment: Attachment | None, final: Path, record: Record
) -> Summary:
    """The summary that stands by the result; its details go to `record`.

    Raises CheckFailed when the live policy is not the one in `final` (P35).
    """
    rows = []
    if attachment is not None:
        rows = attachment.evidence()
        record(acting(attachment, "rollout"))
        record(acting(attachment, "training"))
    for row in rows:
        record(row)
    difference = _live_against_fresh(experiment, model, attachment, final)
    record(LiveCheck(max_difference=difference))
    if difference != 0.0:
        raise CheckFailed(
            f"the live policy's logits differ from those of its saved copy by up to {difference:g}: "
            "rounded weights went stale"
        )
    calls: dict[str, int] = {}
    for row in rows:
        calls[row.phase] = calls.get(row.phase, 0) + row.calls
    return Summary(
        sites=len(attachment.table.plans) if attachment is not None else 0,
        calls=calls,
        live_equals_fresh=True,
        masters_unchanged=True,
    )


def require_provable(
    experiment: Experiment, model: PreTrainedModel, attachment: Attachment | None, start: Path
) -> None:
    """Before anything is trained: that the comparison at the end can be made, for the live policy is its start.

    Leaves chance and evidence of the attachment as they were. Raises CheckFailed.
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
    """Largest difference between the live policy's logits and those of a copy loaded from `folder`, injected alike and
    drawing alike."""
    device = next(model.parameters()).device
    fresh = _fresh(experiment, folder).to(device)
    ids = torch.arange(1, 33, device=device).remainder(model.config.vocab_size).unsqueeze(0)
    model.eval()
    if attachment is None or experiment.injection is None:
        return _difference(model, fresh, ids)
    attachment.set_phase("evaluation")
    with attach(fresh, experiment.injection) as other:
        other.set_phase("evaluation")
        with drawing_alike(attachment, other):
            return _difference(model, fresh, ids)


def _fresh(experiment: Experiment, folder: Path) -> PreTrainedModel:
    """What `folder` holds; a start without an adapter under a fresh one, which changes no number."""
    model, _ = load(folder, experiment.model.dtype)
    if experiment.model.lora is None or (folder / "adapter_config.json").is_file():
        return model
    with torch.random.fork_rng():
        return with_lora(model, experiment.model.lora, folder).eval()


def _difference(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    return float((model(input_ids=ids).logits - other(input_ids=ids).logits).abs().max())
