"""What a checkpoint is compared with: a policy, and the injection under which it was meant to be deployed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp4rl.engines.checkpoints.export import RECORD
from fp4rl.engines.checkpoints.layouts.baked import Baked
from fp4rl.engines.checkpoints.source import dtype_of, injection_of, policy_of
from fp4rl.engines.checkpoints.verify.checkpoint import Checkpoint
from fp4rl.lab.runs import Run
from fp4rl.models.load import base_of
from fp4rl.models.packed.folder import opened
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import parse

# Whose rules a packer's checkpoints are rounded by where no deployment is named.
_USUAL = {"AscendV1": "vllm_ascend", "modelopt": "vllm_blackwell"}


@dataclass(frozen=True)
class Against:
    """`folder` is that of the policy; `run` is None for a model folder."""

    folder: Path
    injection: Injection
    run: Run | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The run's key, or the folder."""
        return self.run.key if self.run else str(self.folder)

    @property
    def experiment(self) -> Experiment | None:
        """The run's description."""
        return Experiment.model_validate(dict(self.run.spec)) if self.run and self.run.spec else None

    @property
    def dtype(self) -> str:
        """The dtype that the policy was evaluated in, for a model folder the one it is stored in."""
        experiment = self.experiment
        return experiment.model.dtype if experiment else dtype_of(base_of(self.folder) or self.folder) or "float32"

    @property
    def experts(self) -> Any:
        """How the run computed stacked experts."""
        experiment = self.experiment
        return experiment.model.experts_implementation if experiment else None


@dataclass(frozen=True)
class Request:
    """What a command line names to compare with; all of it may be left out."""

    against: str | None = None
    runs: Path = Path("runs")
    mode: str | None = None
    deployment: str | None = None


def against(request: Request, record: Mapping[str, Any] | None, checkpoint: Checkpoint) -> Against | None:
    """Return what is named, else what the export recorded; None where nothing is, or it is not here any more.

    The injection is that of the record, unless `request` names a mode or deployment; without a record it is the run's,
    or the mode that the checkpoint says. Raises what `source_of` does.
    """
    what = request.against or (record or {}).get("source")
    if what is None or (request.against is None and not Path(what).is_dir()):
        return None
    folder, run = policy_of(str(what), request.runs)
    if opened(base_of(folder) or folder) is not None:
        raise InvalidValueError(f"{folder} is packed itself; name the unquantized folder, or the run, with --against")
    if record is not None and request.mode is None and request.deployment is None:
        return Against(folder, recorded_injection(record), run)
    if run is not None:
        injection = injection_of(run, request.mode, request.deployment)
    else:
        injection = _of_model(folder, request, checkpoint)
    return Against(folder, injection if checkpoint.method else Baked().deployed(injection), run)


def recorded_injection(record: Mapping[str, Any]) -> Injection:
    """Return the injection under which a folder was exported; InvalidValueError for what is none."""
    return parse(Injection, record.get("injection") or {}, RECORD)


def _of_model(folder: Path, request: Request, checkpoint: Checkpoint) -> Injection:
    mode = request.mode or (checkpoint.mode if checkpoint.method else Baked.mode)
    if mode is None:
        raise InvalidValueError(
            f"{checkpoint.folder}: its layers are in several formats, which is no mode; name its run with --against"
        )
    deployment = request.deployment or _usual(checkpoint)
    changes = {"dtype": dtype} if (dtype := dtype_of(folder)) else {}
    return Injection.named(mode, deployment_named(deployment).name, **changes)


def _usual(checkpoint: Checkpoint) -> str:
    """Return the deployment whose packer writes such a folder, if it was not told otherwise."""
    packed = (checkpoint.packed(name) for name in checkpoint.tensors)
    columns = next((weight.fmt.coarse.columns for weight in packed if weight and weight.fmt.coarse), None)
    if columns is not None:
        return "vllm_ascend_dualscale_64" if columns == 64 else "vllm_ascend_dualscale"
    return _USUAL.get((checkpoint.method or "").partition(" ")[0], Baked.deployment)
