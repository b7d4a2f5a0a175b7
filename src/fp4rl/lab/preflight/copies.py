"""What stands for a run before it begins: the run itself or a small copy, in this process, on a start that is here."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fp4rl.lab.preflight.live import NOT_HERE, without_weights
from fp4rl.spec.errors import CheckFailed, UserError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.linked import START, TEACHER, links
from fp4rl.spec.load import merge
from fp4rl.tasks.arithmetic import Arithmetic

STEPS = 3
EMBEDDED, UNTRAINED = "the embedded model in its place", "its model before the stages that it starts from"
_PROMPTS, _DRAWS, _ANSWERS, _LONGEST, _JUDGED = 8, 2, 8, 64, 4
# Without a warm-up no answer is right; every update still moves the weights.
_IN_ITS_PLACE: Mapping[str, Any] = {
    "model": {"path": None, "embedded": {"warm_up_steps": 0}, "lora": None, "experts_implementation": None},
    "task": {"name": "arithmetic", "difficulty": 1, "train_count": 64},
    "training": {"lr": 4e-4, "entropy_coeff": 1e-3, "filter_groups": {"enable": False}, "reward": "accuracy"},
}
_HERE: Mapping[str, Any] = {
    "health": {},
    "processes": 1,
    "sharding": "none",
    "engine": "trl",
    "rollout": {"engine": "transformers"},
}
_T = TypeVar("_T")


@contextmanager
def scratch(root: Path, within: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder of runs that shares the warmed-up models of `root`."""
    with tempfile.TemporaryDirectory(prefix="fp4rl-", dir=within) as name:
        models = (root / "models").absolute()
        models.mkdir(parents=True, exist_ok=True)
        (Path(name) / "models").symlink_to(models)
        yield Path(name)


def basis(experiment: Experiment) -> tuple[str, str]:
    """Return what a run is tried on where that is not its own start, and why it waits where nothing here can tell."""
    linked, why = links(experiment), without_weights(experiment)
    if TEACHER in linked:
        return "", "it takes weights that another run has yet to train"
    if why is not None and why.startswith(NOT_HERE):
        return "", why
    return EMBEDDED if why is not None else UNTRAINED if START in linked else "", ""


def attempted(stand_in: str, work: Callable[[], _T]) -> tuple[_T | None, str, str]:
    """Return what `work` gives; or why it failed; or why that says nothing of the run, as on a model in its place."""
    try:
        return work(), "", ""
    except (UserError, LookupError) as error:
        # Patterns and layers of a large model need not be those of the one in its place.
        return (None, "", str(error)) if stand_in == EMBEDDED else (None, str(error), "")
    except CheckFailed as error:
        return None, str(error), ""
    except Exception as error:  # of a library; a run would keep the traceback in its log
        first = (str(error).splitlines() or ["no message"])[0]
        return None, f"{type(error).__name__}: {first}", ""


def placed(experiment: Experiment, changes: Mapping[str, Any], *, stand_in: bool) -> Experiment:
    """Return the experiment with `changes`, in this process; on the embedded model where that stands in for its own."""
    described = experiment.model_dump(mode="json") | {"health": {}, "rollout": {}}
    described.pop("start", None)
    described = merge(described, {**changes, **_HERE})
    if stand_in:
        described["task"], described["training"]["rewards"] = {}, []
        described = merge(described, dict(_IN_ITS_PLACE))
    return Experiment.model_validate(described)


def cut(experiment: Experiment, *, stand_in: bool) -> Experiment:
    """Return the experiment in three steps of few and short answers, in this process."""
    recipe = experiment.training
    prompts, longest = min(recipe.train_batch_size, _PROMPTS), min(recipe.max_response_length, _LONGEST)
    updates = next(number for number in range(min(recipe.updates_per_step, prompts), 0, -1) if prompts % number == 0)
    training: dict[str, Any] = {
        "steps": STEPS,
        "train_batch_size": prompts,
        "mini_batch_size": prompts // updates,
        "micro_batch_size": None,
        "rollout_n": min(recipe.rollout_n, _ANSWERS),
        "max_response_length": longest,
        "save_freq": 0,
        "deployed": "last",
        "filter_groups": {"max_num_gen_batches": min(recipe.filter_groups.max_num_gen_batches, _DRAWS)},
    }
    if (recipe.overlong_buffer.len or 0) >= longest:
        training["overlong_buffer"] = {"len": max(1, longest // 5)}
    evaluation = {
        "count": _JUDGED,
        "test_freq": 0,
        "max_new_tokens": longest,
        "matmul_noise": [],
        "formats": [],
        "kl": False,
    }
    changes: dict[str, Any] = {"training": training, "evaluation": evaluation}
    if experiment.injection is not None and (schedule := experiment.injection.schedule) is not None:
        # Every stage within the steps: before in the first one, a blend in the second, the own format in the last.
        soon = {p: {"from_step": min(own.from_step, 1), "over": min(own.over, 1)} for p, own in schedule.points.items()}
        changes["injection"] = {"schedule": soon}
    if isinstance(experiment.task, Arithmetic):  # which makes each of its problems, and checks them against the others
        enough = STEPS * prompts * _DRAWS
        changes["task"] = {"train_count": min(experiment.task.train_count or enough, enough)}
    return placed(experiment, changes, stand_in=stand_in)
