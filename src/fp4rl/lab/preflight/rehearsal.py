"""The training session of each arm as a run builds it, its whole course gone through without training a step.

Built are the model, the trainer, its optimizer and its schedule, of all the steps that are planned. Its first rollout
goes as far as the sampler, which notes what it is given; then the trainer's own callbacks are taken from update to
update to the end, so that what they do at each is seen and not computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path
from typing import Any

from fp4rl.lab.preflight.copies import EMBEDDED, attempted, basis, placed, scratch
from fp4rl.lab.preflight.live import Interrupting
from fp4rl.lab.preflight.rows import Once, Subject
from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.task import Score

_ANSWERED, _TOKENS = 16, 24  # problems of the first batch that are answered, and tokens of each answer

Tokens = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Draw:
    """What the sampler is given in the first rollout, all `prompts` of it and how to `draw`; and the first tokens of
    its `answers`. `chance`: of sampling just these."""

    prompts: Tokens
    draw: str
    answers: Tokens
    chance: float


@dataclass(frozen=True)
class Rehearsed:
    """The course of one arm. `rates`: the learning rate of each update; `judged`: the steps on the way that are judged;
    `steps`: those that are done when the trainer stops. `draws`: of its seed and of another one.

    `described`: what was gone through; `values`: what arms are compared by, in words.
    """

    described: Experiment | None = None
    stand_in: str = ""
    rates: tuple[float, ...] = ()
    judged: tuple[int, ...] = ()
    steps: int = 0
    draws: tuple[Draw, ...] = ()
    problems: int = 0
    values: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    waits: str = ""


@Once
def rehearsed(subject: Subject) -> dict[str, Rehearsed]:
    """Return the course of each arm."""
    with scratch(subject.root) as folder:
        return {arm: _rehearse(own, _seeds(arm, subject), folder) for arm, own in subject.arms.items()}


def _seeds(arm: str, subject: Subject) -> tuple[int, int]:
    """Return the seed of an arm's first run, and that of its second; of a single one, the next number."""
    first, *others = dict.fromkeys(run.seed for run in subject.runs if run.arm == arm)
    return first, others[0] if others else first + 1


def _rehearse(experiment: Experiment, seeds: tuple[int, int], root: Path) -> Rehearsed:
    stand_in, waits = basis(experiment)
    if waits:
        return Rehearsed(waits=waits)
    made, error, waits = attempted(stand_in, lambda: _course(experiment, stand_in, seeds, root))
    return made if made is not None else Rehearsed(stand_in=stand_in, error=error, waits=waits)


def _course(experiment: Experiment, stand_in: str, seeds: tuple[int, int], root: Path) -> Rehearsed:
    # A sum of few problems, since those of the task of the embedded model are made.
    changes = {"evaluation": {"count": _ANSWERED}} if stand_in == EMBEDDED else {}
    own = placed(experiment, changes, stand_in=stand_in == EMBEDDED)
    first, second = (_session(own.model_copy(update={"seed": seed}), root) for seed in seeds)
    draws = [_draw(first, None)]
    draws.append(_draw(second, draws[0].prompts))
    begun = _beginning(first, draws[0], of_itself=stand_in != EMBEDDED)
    rates, judged, steps = _gone_through(first)
    several = {
        "optimizer": _optimizer(first.trainer.optimizer),
        "learning rate": f"{rates[0]:g} to {rates[-1]:g}, at most {max(rates):g}, {digest(rates)}",
        "updates": f"{len(rates)}",
    }
    return Rehearsed(own, stand_in, rates, judged, steps, tuple(draws), len(first.stream.problems), begun | several)


def _session(experiment: Experiment, root: Path) -> Any:
    from fp4rl.rl.events import ignore
    from fp4rl.rl.inputs import ALONE, start_folder, teacher_folder
    from fp4rl.rl.run import Run
    from fp4rl.rl.session import ResumeState, TrainingSession

    start = start_folder(experiment.model, experiment.task, root / "models")
    run = Run(experiment, root / "rehearsed", start, ignore, teacher=teacher_folder(experiment, ALONE))
    return TrainingSession(run, ResumeState())


def _draw(session: Any, prompts: Sequence[Sequence[int]] | None) -> Draw:
    """Begin the first rollout of a session; its sampler answers the first of its prompts, or of these `prompts`."""
    trainer, made = session.trainer, list[Draw]()
    sample = trainer.parts.sampler

    def sampler(model: Any, tokenizer: Any, given: Sequence[Sequence[int]], how: Any) -> Any:
        few = [list(row) for row in dict.fromkeys(_tokens(prompts or given))][:_ANSWERED]
        short = replace(how, max_new_tokens=min(how.max_new_tokens, _TOKENS), routes=False)
        answers = list(sample(model, tokenizer, few, short))
        chance = exp(float(sum(answer.logps.double().sum() for answer in answers)))
        made.append(Draw(_tokens(given), _words(how), _tokens(answer.tokens for answer in answers), chance))
        raise Interrupting

    trainer.parts = replace(trainer.parts, sampler=sampler)
    try:
        trainer._generate_and_score_completions([{}] * trainer.args.steps_per_generation)
    except Interrupting:
        return made[0]
    finally:
        trainer.parts = replace(trainer.parts, sampler=sample)
    raise AssertionError("a rollout without its sampler")


def _tokens(rows: Any) -> Tokens:
    return tuple(tuple(map(int, row)) for row in rows)


def _words(how: Any) -> str:
    """Return how answers are drawn, in words."""
    ends = f", to {' or '.join(map(repr, how.stop))}" if how.stop else ""
    drawn = f"temperature {how.temperature:g}, top_p {how.top_p:g}, {how.count} answer(s)"
    return f"{drawn} of at most {how.max_new_tokens} tokens{ends}"


def _beginning(session: Any, draw: Draw, *, of_itself: bool) -> dict[str, str]:
    """Return what a session begins with: its weights, what it learns from first and how, and what it is judged on."""
    values = {"sampling": draw.draw, "answers a step": f"{len(draw.prompts)}"}
    if not of_itself:
        return values
    from fp4rl.rl.prompts import encoded
    from fp4rl.rl.verify import weights_digest

    later = session.stream.take(session.trainer.filler.groups)
    batches = [*draw.prompts, *_tokens(encoded(session.model, session.tokenizer, later))]
    judged, how = _judged(session)
    return values | {
        "start weights": weights_digest(session.model),
        "first batches": digest(batches),
        "problems judged": f"{len(judged)}, {digest(judged)}",
        "judging": how,
    }


def _judged(session: Any) -> tuple[Tokens, str]:
    """Return the token ids of each problem that a session is judged on, and how its answers are drawn."""
    from fp4rl.rl.evaluate import answer
    from fp4rl.rl.generate import Generation

    runner, seen, ways = session.run.runner, list[Any](), dict[str, None]()

    def sampler(model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: Any) -> list[Generation]:  # noqa: ARG001
        seen.extend(prompts)
        ways[_words(sampling)] = None
        return [Generation([], "", True)] * (len(prompts) * sampling.count)

    def unscored(*_: Any) -> Score:
        return Score(False, False, False)

    answer(session.model, session.tokenizer, runner.problems, unscored, runner.spec, sampler=sampler)
    return _tokens(seen), "; ".join(ways)


def _gone_through(session: Any) -> tuple[tuple[float, ...], tuple[int, ...], int]:
    """Take a session's callbacks to the end of its run; return the learning rate of each update, the steps on the way
    that are judged, and how many are done in the end."""
    trainer, judged, rates = session.trainer, list[int](), list[float]()

    def noted(_: int, *, chosen_alone: bool) -> dict[str, float]:
        if not chosen_alone:
            judged.append(trainer.step)
        return {}

    session._validated = noted  # of which the steps count, not the numbers
    args, loader = trainer.args, trainer.get_train_dataloader()
    *_, updates = trainer.set_initial_training_values(args, loader)
    trainer._init_training_state(updates, updates, 1, None, None)
    trainer._prepare_for_training(updates, loader, None)
    while not trainer.control.should_training_stop:
        trainer.control = trainer.callback_handler.on_step_begin(args, trainer.state, trainer.control)
        rates.append(float(trainer.optimizer.param_groups[0]["lr"]))
        trainer.optimizer.step()  # without a gradient, so that nothing moves
        trainer.lr_scheduler.step()
        trainer.state.global_step += 1
        trainer.control = trainer.callback_handler.on_step_end(args, trainer.state, trainer.control)
        if trainer.control.should_log:
            trainer.log({"grad_norm": 1.0, "learning_rate": rates[-1]})
    return tuple(rates), tuple(judged), trainer.step


def _optimizer(optimizer: Any) -> str:
    """Return an optimizer and the settings of each of its groups, with their number of weights, in words."""
    inner = getattr(optimizer, "optimizer", optimizer)
    groups = []
    for group in inner.param_groups:
        named = {key: group[key] for key in ("initial_lr", "betas", "eps", "weight_decay", "momentum") if key in group}
        settings = ", ".join(f"{key} {value}" for key, value in named.items())
        groups.append(f"{sum(p.numel() for p in group['params'])} weights at {settings}")
    return f"{type(inner).__name__}: {'; '.join(groups)}"
