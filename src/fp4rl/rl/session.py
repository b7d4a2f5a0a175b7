"""One training session: a live model from the start or a checkpoint, until it is done or the monitor ends it."""

import shutil
from dataclasses import dataclass, field
from math import ceil, nan
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.inject.attach import Attachment, attach
from fp4rl.models.load import load
from fp4rl.models.save import save
from fp4rl.rl import processes
from fp4rl.rl.agreement import require_alike, require_averaged
from fp4rl.rl.checkpoints import Checkpoint, SaveClock, complete, rotate
from fp4rl.rl.clipping import clipping_figures, masters_of
from fp4rl.rl.components import TrainerComponents
from fp4rl.rl.deployed import Deployed
from fp4rl.rl.events import Interrupted, Message, StepDone
from fp4rl.rl.fill import PromptStream
from fp4rl.rl.generate import dropout_off, evidence_of, sampler_named
from fp4rl.rl.health.monitor import LiveMonitor
from fp4rl.rl.lora import with_lora
from fp4rl.rl.mismatch import is_repeatable
from fp4rl.rl.oscillation import OscillationWatch, watched_weights
from fp4rl.rl.phases import Phases
from fp4rl.rl.problems import problems_of
from fp4rl.rl.reference import reference_and_teacher
from fp4rl.rl.rewards import Rewarder, rewards_of
from fp4rl.rl.run import Run
from fp4rl.rl.sharding import gathered, shard
from fp4rl.rl.trainer import Trainer
from fp4rl.rl.verify import weights_digest
from fp4rl.sites.modalities import freeze_other_modules
from fp4rl.spec.errors import EngineLost, NotFinite, require_finite
from fp4rl.spec.evidence import CheckpointKept


@dataclass
class ResumeState:
    """What happened before a session: the checkpoint that it starts from, metrics by step, number of rollbacks."""

    checkpoint: Checkpoint | None = None
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    rollbacks: int = 0


class TrainingSession:
    """Builds all in an order that fixes the randomness (seed, model, adapters, injection, trainer), and trains."""

    def __init__(self, run: Run, resume: ResumeState) -> None:
        self.run = run
        self.resume = resume
        experiment = run.experiment
        torch.manual_seed(experiment.seed)
        self.model, self.tokenizer = opened(run)
        self.attachment: Attachment | None = None
        if experiment.injection is not None:
            self.attachment = attach(self.model, experiment.injection)
        if processes.count() > 1:
            injected = "nothing" if self.attachment is None else self.attachment.table.digest
            require_alike(f"{weights_digest(self.model)}, {injected} injected", "the weights before training")
        if experiment.sharding == "fsdp2":
            shard(self.model)
        seed, steps = experiment.seed, experiment.training.steps
        self.phases = Phases(
            self.model, self.attachment, experiment.noise, seed=seed, total_steps=steps, record=run.emit
        )
        self.monitor = LiveMonitor(experiment.health, sorted(resume.metrics.items()), run.emit)
        self.saving, self.interrupted = SaveClock(), False
        self.stream = PromptStream(problems_of(experiment, "train"), experiment.seed)
        self.sampler = sampler_named(experiment.rollout)
        self.trainer = Trainer(self.model, self.tokenizer, self._parts(), run.folder / "checkpoints")
        self.deployed = Deployed(self.model, None, experiment.training, self.phases.weights_changed)
        self.oscillation: OscillationWatch | None = None
        self._at: tuple[int, dict[str, Any]] | None = None  # the last boundary of a run that a server samples for

    def train(self) -> None:
        """Train to the last step, or to the one after which the monitor ends it.

        Raises Interrupted between steps, and NotFinite within one unless the monitor is to roll back. EngineLost too,
        after it has kept what was trained so far.
        """
        checkpoint = self.resume.checkpoint
        try:
            self.trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint is not None else None)
        except EngineLost:
            self._keep_boundary()
            raise
        except NotFinite as error:
            step = max(self.resume.metrics, default=0) + 1
            self.monitor.observe(step, {"policy_loss": nan})
            last = self.resume.rollbacks >= self.run.experiment.health.max_rollbacks
            if self.monitor.verdict != "rollback" or last:
                raise NotFinite(f"step {step}: {error}") from None
        if self.interrupted:
            raise Interrupted(f"after step {self.trainer.step}, with a checkpoint; the same command goes on from there")

    def save(self, folder: Path) -> Path:
        """Save the present policy with its tokenizer; return the folder."""
        weights = gathered(self.model)
        if processes.is_first():
            experts = self.run.experiment.model.experts_implementation
            save(self.model, self.tokenizer, folder, self.run.start, experts, weights)
        processes.wait()
        return folder

    def _parts(self) -> TrainerComponents:
        run, experiment = self.run, self.run.experiment
        recipe = experiment.training
        rewarder = Rewarder(experiment.task.score, rewards_of(recipe), lambda line: run.emit(Message(line)))
        return TrainerComponents(
            recipe,
            self.stream,
            rewarder,
            self.phases,
            *reference_and_teacher(experiment, (run.start, run.teacher), self.model, self.phases),
            self,
            run.emit,
            experiment.seed,
            lambda model: masters_of(model, self.attachment, experiment),
            self.sampler,
        )

    def _checkpoints_to_keep(self) -> int:
        """Return how many at multiples of `save_freq` stay: with rollbacks, one must be older than an alarm's onset."""
        health, recipe = self.run.experiment.health, self.run.experiment.training
        every = recipe.save_freq
        policies = {health.policy, *health.policies.values(), *(rule.action for rule in health.rules)}
        return recipe.save_total_limit + (
            ceil(health.thresholds.persist / every) if every and "rollback" in policies else 0
        )

    # -- what the trainer calls

    def on_begin(self, trainer: Any) -> None:
        """Restore a checkpoint's state besides the trainer's files, and lower the learning rate after rollbacks."""
        checkpoint, rolled_back = self.resume.checkpoint, self.resume.rollbacks
        recipe, masters = self.run.experiment.training, self.trainer.masters
        self.deployed = Deployed(self.model, masters, recipe, self.phases.weights_changed)
        if recipe.oscillation is not None and self.attachment is not None:
            self.oscillation = OscillationWatch(self.attachment, masters, recipe.oscillation)
        if checkpoint is not None:
            self.stream.position = checkpoint.state["positions"][self.stream.rank]
            self.phases.restore(checkpoint.state["phases"][self.stream.rank])
            if masters is not None:
                masters.load(checkpoint.path)
            self.deployed.load(checkpoint.path, checkpoint.state["deployed"])
            self._anchor()
            if self.oscillation is not None:
                self.oscillation.load(checkpoint.path, checkpoint.state["oscillation"])
            rolled_back -= checkpoint.state["rollbacks"]
        elif masters is not None and masters.clamps:  # the policy that the first rollout samples from
            masters.write()
            self.phases.weights_changed()
        if processes.count() > 1 and (self.attachment is None or is_repeatable(self.attachment)):
            with self.phases.unobserved(), trainer.routers.paused(), dropout_off(self.model):
                require_averaged(trainer.model_wrapped, self.model)
        if rolled_back:
            _scale_lr(trainer, self.run.experiment.health.rollback_lr**rolled_back)

    def on_gradients(self) -> None:
        """Add the gradient of dampening."""
        if self.oscillation is not None:
            self.oscillation.before()

    def on_update(self) -> dict[str, float]:
        """Compare codes with those before the update, and let the average of the weights follow; return metrics."""
        if self.rounds_by_average:  # which decides on the codes that are then compared
            self.deployed.update()
            self._anchor()
        metrics = self.oscillation.after() if self.oscillation is not None else {}
        if not self.rounds_by_average:  # it follows what was frozen
            self.deployed.update()
        return metrics | clipping_figures(self.trainer.masters)

    @property
    def rounds_by_average(self) -> bool:
        """Whether the average decides between the two levels of each weight."""
        ema = self.run.experiment.training.ema
        return ema is not None and ema.rounds

    def _anchor(self) -> None:
        """Let the averages decide, where the recipe says so."""
        if self.rounds_by_average and self.attachment is not None and self.deployed.means:
            for name, watched in watched_weights(self.attachment, None).items():
                watched.state.anchor = self.deployed.means[name]

    def on_step(self, step: int, metrics: dict[str, float]) -> bool:
        """Evaluate where it is due, report the step and let the monitor judge it; return whether to stop."""
        every, last = self.run.experiment.evaluation.test_freq, self.run.experiment.training.steps
        if every and (step % every == 0 or step == last):
            metrics = metrics | self._validated(step, chosen_alone=step == last)
        require_finite("metrics", metrics)
        for line in evidence_of(self.sampler):
            self.run.emit(line.extended(step=step - 1))
        self.resume.metrics[step] = metrics
        self.run.emit(StepDone(step, metrics))
        self.saving.begin()
        return self.monitor.observe(step, metrics)

    def on_boundary(self, step: int) -> tuple[bool, bool]:
        """Return whether to write a checkpoint, by the clock, and whether to stop, since the run was interrupted."""
        due = self.saving.due(last=step == self.run.experiment.training.steps)
        due, self.interrupted = processes.from_first((due, self.run.interrupted()))
        if self.run.experiment.rollout.server is not None:
            self._at = step, self._state()
        return due or self.interrupted, self.interrupted

    def _validated(self, step: int, *, chosen_alone: bool) -> dict[str, float]:
        """Return accuracy on held-out problems during training, of a saved copy as in every evaluation, and the one by
        which the best step is chosen, if any is; with `chosen_alone` nothing else."""
        chooses = self.run.experiment.training.deployed == "best"
        if chosen_alone and not chooses:
            return {}
        with self.deployed.policy():
            folder = self.save(self.run.folder / "on-the-way")
            metrics = {} if chosen_alone else self._judged(folder, step)
            if chooses:
                score = processes.from_first(processes.agreed(lambda: self.run.choice(folder, step)))
                self.deployed.consider(step, score)
                metrics["accuracy/choice"] = score
        if processes.is_first():
            shutil.rmtree(folder)
        return metrics

    def _judged(self, folder: Path, step: int) -> dict[str, float]:
        judged = processes.agreed(lambda: list(self.run.judged(folder, step)))
        accuracies = processes.from_first({e.profile.name: (e.share("strict"), len(e.items)) for e in judged})
        goal, answers = accuracies.get("deployment", next(iter(accuracies.values())))
        of_each = {f"accuracy/validation_{name}": share for name, (share, _) in accuracies.items()}
        return {"accuracy/validation": goal, "accuracy/validation_answers": float(answers), **of_each}

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Complete a checkpoint with the state that the trainer does not have, and delete those not needed any more."""
        if self.monitor.verdict != "note":
            return  # left incomplete: no run shall resume where the monitor ended it
        self.run.emit(CheckpointKept(step=step))
        state = self._at[1] if self._at is not None else self._state()
        masters = self.trainer.masters
        if masters is not None and (masters.sharded or processes.is_first()):
            masters.save(folder)
        if processes.is_first():
            self.deployed.save(folder)
            if self.oscillation is not None:
                self.oscillation.save(folder)
        processes.wait()  # each process writes a file of its own into it
        if processes.is_first():
            complete(folder, step, self.run.stamp, state)
            rotate(folder.parent, self.run.experiment.training.save_freq, self._checkpoints_to_keep())
        processes.wait()
        self.saving.end()

    def _state(self) -> dict[str, Any]:
        return {
            "positions": self.trainer.positions(),
            "phases": processes.from_all(self.phases.state()),
            "rollbacks": self.resume.rollbacks,
            "inputs": self.run.inputs,
            "deployed": self.deployed.state(),
            **({} if self.oscillation is None else {"oscillation": self.oscillation.state()}),
        }

    def _keep_boundary(self) -> None:
        """Write a checkpoint of the last boundary, from which nothing was trained since: a rollout failed."""
        trainer = self.trainer
        if self._at is not None and self._at[0] == trainer.step:
            trainer._save_checkpoint(trainer.model, None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


def opened(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the start's model and tokenizer, with a fresh adapter where the spec has one; only text is trained."""
    spec = run.experiment.model
    model, tokenizer = load(run.start, spec.dtype, spec.experts_implementation)
    freeze_other_modules(model)
    if spec.lora is not None:
        model = with_lora(model, spec.lora, run.start)
    return model.to(processes.device()), tokenizer


def beginning(run: Run) -> PreTrainedModel:
    """Load the model as the first session began with it: the same folder, the same values in a fresh adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(run.experiment.seed)
        return opened(run)[0]


def _scale_lr(trainer: Any, factor: float) -> None:
    """Scale the learning rate permanently: the optimizer's, and the base value of its schedule."""
    for group in trainer.optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] = group.get("initial_lr", group["lr"] / factor) * factor
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    scheduler.base_lrs = [lr * factor for lr in scheduler.base_lrs]
    scheduler._last_lr = [lr * factor for lr in scheduler._last_lr]  # the value that is logged for the next update
