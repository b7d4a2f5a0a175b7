"""TRL's GRPOTrainer with fp4rl's own rollout, dynamic sampling and loss: the only file that imports trl.

TRL keeps the loop, optimizer, mixed precision, gradient accumulation, several processes and checkpoints. Overridden are
five seams, checked by `tests/rl/test_trainer_seams.py`: a generation batch (`_generate_and_score_completions`,
`_prepare_inputs`), a micro-batch (`_compute_loss`), the weights that are updated (`create_optimizer`, `training_step`,
`_clip_grad_norm`), the ends of optimizer steps and checkpoints (a callback) and the log line (`log`).
"""

from operator import sub
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import add_fused_lm_head

from fp4rl.rl import processes
from fp4rl.rl.components import TrainerComponents, arguments
from fp4rl.rl.events import Message, Sampled
from fp4rl.rl.fill import Filler
from fp4rl.rl.generate import Sampling, answer_logps, dropout_off, drops, whole_sequences
from fp4rl.rl.losses import Whole
from fp4rl.rl.masters import Masters
from fp4rl.rl.mismatch import compare_sampler, is_due
from fp4rl.rl.objective import MicroBatch, objective
from fp4rl.rl.reference import Teacher, below_adapters
from fp4rl.rl.rollout import Rollout, by_length, roll_out, seed_rollout, training_batch
from fp4rl.rl.routing import RouterWatch
from fp4rl.rl.sharding import CheckpointsInParts
from fp4rl.rl.step_metrics import StepMeans, StepTimer, clocks, finite_norm, joined
from fp4rl.spec.task import Problem


class Trainer(CheckpointsInParts, GRPOTrainer):  # type: ignore[misc]
    """Runs steps: fill a batch with groups that have spread, then make `updates_per_step` updates from it."""

    _buffered_inputs: Any  # TRL's: the micro-batches of the step, None before the first

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: TrainerComponents, folder: Path
    ) -> None:
        self.parts = parts
        self._step_metrics: dict[str, float] = {}
        self._means, self.timer, self.learned = StepMeans(), StepTimer(), True
        self.masters: Masters | None = None
        recipe = parts.recipe
        super().__init__(
            model=model,
            reward_funcs=[_scored_by_the_stream],
            args=GRPOConfig(**arguments(recipe, folder, parts.seed, processes.count())),
            # Prompts come from the stream: dynamic sampling takes a varying number of them. TRL's loader only counts.
            train_dataset=Dataset.from_dict({"prompt": [""] * recipe.train_batch_size}),
            processing_class=tokenizer,
        )
        with parts.phases.unobserved():
            self.routers = RouterWatch(self.model, replay=recipe.routing_replay)
            self._drops = drops(self.model)
        if self.routers.unseen:
            parts.emit(Message(f"no figures of routing: {self.routers.unseen}"))
        parts.stream.rank, parts.stream.world = self.accelerator.process_index, self.accelerator.num_processes
        self.filler = Filler(recipe, parts.stream, parts.rewarder, recipe.train_batch_size // parts.stream.world)
        self.teacher = None
        if parts.teacher is not None and recipe.distillation is not None:
            self.teacher = Teacher(parts.teacher, self.model, recipe.distillation, recipe.temperature)
        if parts.reference is not None and parts.reference.is_copy:
            add_fused_lm_head(below_adapters(parts.reference.model), temperature=recipe.temperature)
        self.add_callback(_AroundTheOptimizer(self))

    @property
    def step(self) -> int:
        """The number of steps done: batches of rollouts whose updates are all made."""
        return int(self.state.global_step) // self.parts.recipe.updates_per_step

    def positions(self) -> list[int]:
        """Return the number of problems that each process has taken from its stream."""
        return processes.from_all(self.parts.stream.position)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card beside a checkpoint: it would describe TRL's defaults instead of this run."""

    # -- the weights that are updated

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create TRL's own optimizer, over FP32 copies of weights that are in another dtype."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        self.masters = self.parts.masters(self.model)
        if self.masters is not None:
            self.masters.put_into(optimizer)
        return optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """Run forward and backward of a micro-batch, and add its gradients to the FP32 copies; return the loss."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.routers.prescribe(None)
        if self.masters is not None:
            self.masters.take_gradients(self.accelerator)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self.parts.supervisor.on_gradients()
        if self.masters is None:
            return finite_norm(super()._clip_grad_norm(model))
        return finite_norm(self.accelerator.clip_grad_norm_(self.masters.parameters(), self.args.max_grad_norm))

    # -- a generation batch

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.timer.lap("between")
        self._began, recipe = clocks(), self.parts.recipe
        seed_rollout(self.parts.seed, self.step, self.accelerator.process_index)
        data_epochs = sum(self.positions()) / len(self.parts.stream.problems)
        with self.parts.phases.rollout(self.step, data_epochs):
            self.timer.lap("noise")
            filled = processes.agreed(lambda: self.filler.fill(self._sample))
            self.timer.lap("rewards")
        self.timer.lap("noise")
        self.parts.emit(Sampled(self.step + 1, filled.generations[0].sample(recipe.rollout_n)))
        if line := filled.report():
            self.parts.emit(Message(f"step {self.step}: {line}"))
        # Nothing is trained yet: these are answers of the start, under the planned noise.
        if self.step == 0 and not self.filler.distils_alone and (line := filled.without_spread(recipe.rollout_n)):
            self.parts.emit(Message(f"before any training: {line}"))
        pad_id, device = self._tokenizer.pad_token_id, torch.device(self.accelerator.device)
        batch = training_batch(filled.answers, filled.generations[0].answers()[0], recipe, len(inputs), pad_id, device)
        self._step_metrics = {
            **filled.metrics(recipe.rollout_n),
            **self.routers.load(batch),
            "noise/sigma": self.parts.phases.sigma,
            "time/rollout_s": clocks()[0] - self._began[0],
        }
        self.timer.lap("batch")
        if (reference := self.parts.reference) is not None:
            with torch.no_grad(), reference.scoring(), dropout_off(reference.model), self.routers.paused():
                batch["ref_per_token_logps"], _ = self._score(reference.model, batch)
            self.timer.lap("reference")
        if is_due(self.parts.phases, self.step):
            self._step_metrics |= compare_sampler(self.parts.phases, self.step, batch, self._old)
            self.timer.lap("comparison")
        if self.parts.phases.scores_with_noise:
            batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
        elif self._drops:
            batch["old_per_token_logps"] = self._old(batch)
            self.timer.lap("old_logps")
        return batch

    def _sample(self, problems: list[Problem]) -> Rollout:
        self.timer.lap("rewards")
        recipe = self.parts.recipe
        sampling = Sampling(
            recipe.max_response_length, recipe.temperature, recipe.top_p, stop=recipe.stop, logps=True, routes=True
        )
        with self.routers.paused(), unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            rollout = roll_out(self.parts.sampler, model, self._tokenizer, problems, sampling)
        self.timer.lap("generation")
        return rollout

    def _score(self, model: Any, batch: dict[str, Tensor], *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compute log-probabilities [rows, T] of the answers under `model`, and the entropies of its distributions."""
        rows, before = self.args.per_device_train_batch_size, self.routers.following(batch)
        with self.accelerator.autocast():
            return answer_logps(model, batch, rows=rows, entropy=entropy, before=before)

    @torch.no_grad()
    def _old(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute log-probabilities under the policy that the answers were sampled from: the present, no dropout."""
        with dropout_off(self.model):
            logps, _ = self._score(self.model, batch)
        self.routers.prescribe(None)
        return logps

    # -- a micro-batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        """Return the next micro-batch; those of a new batch of answers are first put in order of length."""
        before = self._buffered_inputs
        inputs: dict[str, Tensor] = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:
            self._buffered_inputs = by_length(self._buffered_inputs, self.args.gradient_accumulation_steps)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        self.timer.lap("other")
        mask = inputs.get("loss_mask", inputs["completion_mask"])
        logps, entropies = self._score(model, inputs, entropy=True)
        assert entropies is not None
        span = self.args.gradient_accumulation_steps  # the micro-batches of this optimizer step
        begin = self._step % self.args.steps_per_generation // span * span
        masks = [p.get("loss_mask", p["completion_mask"]) for p in self._buffered_inputs[begin : begin + span]]
        self.learned, whole = Whole.of_step(masks, self.accelerator)
        self.timer.lap("forward")
        with self.routers.paused():
            teacher_kl = self.teacher.kl(*whole_sequences(inputs), mask) if self.teacher is not None else None
        if self.teacher is not None:
            self.timer.lap("teacher")
        batch = MicroBatch(
            logps=logps,
            advantages=inputs["advantages"],
            mask=mask,
            old_logps=inputs.get("old_per_token_logps"),
            ref_logps=inputs.get("ref_per_token_logps"),
            entropies=entropies,
            sampler_logps=inputs["sampling_per_token_logps"],
            teacher_kl=teacher_kl,
            first=begin == 0,
            old_is_sampler=self.parts.phases.scores_with_noise,
        )
        loss, metrics = objective(batch, self.parts.recipe, whole)
        self._means.add(metrics, mask)
        self.timer.lap("loss")
        return loss

    @torch.no_grad()
    def score_later_updates(self) -> None:
        """Compute, before the first update of a step, the old log-probabilities of all answers of later updates.

        The first update needs none: its policy is the old one. With dropout it is not, and all are computed already.
        """
        done, span = self._step % self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if self.parts.recipe.updates_per_step == 1 or done != span:
            return
        for batch in self._buffered_inputs[span:]:
            if "old_per_token_logps" not in batch:
                batch["old_per_token_logps"] = self._old(batch)
        self.timer.lap("old_logps")

    # -- the log line

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002
        """Collect what TRL logs after each update, and report one line of metrics after the last update of a step."""
        if "grad_norm" not in logs:
            return
        self._metrics["train"].clear()
        self._means.add_update(grad_norm=float(logs["grad_norm"]), lr=float(logs["learning_rate"]))
        if self.state.global_step % self.parts.recipe.updates_per_step:
            return
        metrics = self._means.take(self.parts.recipe.updates_per_step) | self.routers.take()
        metrics["time/step_s"], metrics["time/cpu_s"] = map(sub, clocks(), self._began)
        self.timer.lap("other")
        metrics |= {f"time/{name}_s": s for name, s in self.timer.take().items()} | self.parts.phases.precision()
        if self.parts.supervisor.on_step(self.step, joined(processes.from_all({**self._step_metrics, **metrics}))):
            self.control.should_training_stop = True


class _AroundTheOptimizer(TrainerCallback):  # type: ignore[misc]
    """Does what must happen right before and after the optimizer writes the weights, and around checkpoints."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Restore the rest of a checkpoint's state, after model, optimizer and scheduler were loaded."""
        self._trainer.parts.supervisor.on_begin(self._trainer)
        self._trainer.timer.restart()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Book the time of the backward of a micro-batch that is not the last of its update."""
        self._trainer.timer.lap("backward")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Check, once, that training called every site; and drop the gradients of a batch without any answer.

        A zero gradient would still change the weights by momentum.
        """
        self._trainer.timer.lap("backward")
        self._trainer.parts.phases.require_calls("training")
        self._trainer.score_later_updates()
        if not self._trainer.learned:
            self._trainer.model.zero_grad(set_to_none=True)
            if self._trainer.masters is not None:
                self._trainer.masters.drop_gradients()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Drop cached rounded weights: a fused AdamW leaves no other trace of its step."""
        if self._trainer.masters is not None:
            self._trainer.masters.write()
        self._trainer._means.add_update(**self._trainer.parts.supervisor.on_update())
        self._trainer.parts.phases.weights_changed()
        self._trainer.timer.lap("optimizer")

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide, after the last update of a step, about a checkpoint and about the end; only here can they be made."""
        if state.global_step % self._trainer.parts.recipe.updates_per_step == 0:
            save, stop = self._trainer.parts.supervisor.on_boundary(self._trainer.step)
            control.should_save = control.should_save or save
            control.should_training_stop = control.should_training_stop or stop

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Complete the trainer's checkpoint with fp4rl's file, written last."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._trainer.parts.supervisor.on_checkpoint(self._trainer.step, folder)


def _scored_by_the_stream(**_: Any) -> list[float]:
    raise AssertionError("TRL's own reward path was taken; answers are scored by the filler")
