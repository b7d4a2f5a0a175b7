"""verl's synchronous trainer under an experiment, and its workers: each step proves that the plug-in acted."""

from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.engine_workers import ActorRolloutRefWorker

from fp4rl.engines.environment import noisy_operators
from fp4rl.engines.verl.beyond import rounding_rollouts
from fp4rl.engines.verl.engine import Engine
from fp4rl.engines.verl.limits import require_possible
from fp4rl.engines.verl.old import flat, require_agreement
from fp4rl.engines.verl.policy import Report
from fp4rl.engines.verl.rollouts import Rollouts
from fp4rl.engines.verl.settings import TRAINER_MODE, experiment
from fp4rl.engines.verl.watch import RunWatch
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.evidence import Failed
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.points import Phase


class PolicyWorker(ActorRolloutRefWorker):  # type: ignore[misc]
    """verl's worker with engines of the plug-in. It cannot be called Worker: by that name verl finds its own base."""

    rollouts: Rollouts | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def init_model(self) -> None:
        """Build actor, reference and rollout as verl does. Raises CheckFailed where verl took another engine."""
        Engine.experiment = _experiment()
        super().init_model()
        for name, worker in (("actor", self.actor), ("reference", self.ref)):
            if worker is not None and not isinstance(worker.engine, Engine):
                kind = type(worker.engine)
                raise CheckFailed(f"the {name}'s engine is {kind.__module__}.{kind.__name__}, which rounds nothing")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)  # type: ignore[untyped-decorator]
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> Any:
        """Send weights as verl does. What the rollout rounds itself is counted before them, and begins anew after."""
        rollouts = self._fp4rl_rollouts()
        if rollouts is not None:
            await rollouts.end()
        metrics = await super().update_weights(global_steps=global_steps, mode=mode)
        if rollouts is not None:
            await rollouts.begin()
        return metrics

    def _fp4rl_rollouts(self) -> Rollouts | None:
        if self.rollouts is None and rounding_rollouts(_experiment()) and self.rollout._ensure_server_handle():
            self.rollouts = Rollouts(self.actor.engine.policy, self.rollout.server_handle)
        return self.rollouts

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def fp4rl_report(self, trained: bool = False, last: bool = False) -> Report:
        """Return what the actor's policy did since the last report."""
        return self.actor.engine.policy.report(trained=trained, last=last)  # type: ignore[no-any-return]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def fp4rl_stream_as(self, phase: Phase) -> None:
        """Let the next weights be those of a rollout, or of an evaluation."""
        self.actor.engine.policy.stream_as(phase)


class Trainer(PPOTrainerSync):  # type: ignore[misc]
    """PPO, GRPO and DAPO in verl's synchronous loop. In all other respects it is that of `trainer_mode=sync`."""

    watch: RunWatch
    total_training_steps: int

    def __init__(self, config: DictConfig) -> None:
        self.experiment = _experiment()
        require_possible(self.experiment, lambda key: OmegaConf.select(config, key))
        present = dict(flat(OmegaConf.to_container(config)))
        for line in require_agreement(self.experiment, present, noisy_operators()):
            _say(f"fp4rl: warning: {line}")
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl decides by this name how it samples and saves
        super().__init__(config)

    def fit(self, agent_loop_manager: Any) -> None:
        """Train; what breaks a run off is written to its record."""
        try:
            super().fit(agent_loop_manager)
        except BaseException as error:
            self.watch.failed(Failed(why=f"{type(error).__name__}: {error}"[:2000]))
            raise

    def on_init_end(self) -> None:
        """Send the first weights, and require that the plug-in rounded them."""
        described = self.experiment.training.steps
        if self.total_training_steps != described:
            raise InvalidValueError(
                f"verl takes {self.total_training_steps} steps, and the experiment's training.steps is {described}, "
                f"which schedules follow; write trainer.total_training_steps={described}, and enough epochs"
            )
        folder = Path(self.config.trainer.default_local_dir)
        self.watch = RunWatch(self.experiment, folder, described, self.global_steps, say=_say)
        super().on_init_end()
        self.watch.opened(self._reports())

    def on_step_end(self) -> None:
        """Send the weights of after the step; its metrics carry the counters."""
        super().on_step_end()
        self._pending_sync_metrics = self.watch.stepped(self.global_steps, self._reports(trained=True))

    def on_validate_begin(self) -> None:
        """Give the rollout engine the weights of an evaluation: without noise, rounded where evaluations are."""
        super().on_validate_begin()
        self._stream_as("evaluation")

    def on_validate_end(self) -> None:
        """Give the rollout engine the weights of the next rollout back."""
        super().on_validate_end()
        self._stream_as("rollout")

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            if role is not Role.Critic:
                self.role_worker_mapping[role] = ray.remote(PolicyWorker)

    def _compute_metrics(self, batch: Any, metrics: Any, timing_raw: Any, global_steps: int, epoch: int) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        metrics.update(self.watch.judged(global_steps, metrics))
        last = global_steps >= self.total_training_steps
        if self.watch.stopped and not last:
            self.total_training_steps = global_steps
            if self.config.trainer.save_freq > 0:
                self._save_checkpoint()
        if self.watch.stopped or last:
            self.watch.closed(self._reports(last=True))

    def _stream_as(self, phase: Phase) -> None:
        if self._as_sampled:
            return
        self.actor_rollout_wg.fp4rl_stream_as(phase)
        self.checkpoint_manager.sleep_replicas()
        self.checkpoint_manager.update_weights(self.global_steps)
        self.watch.resynced(self._reports())

    @property
    def _as_sampled(self) -> bool:
        """Whether an evaluation computes with the weights that rollouts sample with, and is not counted apart."""
        injection = self.experiment.injection
        phases = (injection.apply_during.active(p) for p in ("rollout", "evaluation")) if injection is not None else ()
        apart = self.experiment.noise is not None or rounding_rollouts(self.experiment)
        return not apart and len({"weight" in points for points in phases}) < 2

    def _reports(self, *, trained: bool = False, last: bool = False) -> list[Report]:
        reports: list[Report] = self.actor_rollout_wg.fp4rl_report(trained=trained, last=last)
        return reports


def _experiment() -> Experiment:
    described = experiment()
    if described is None:
        raise InvalidValueError(
            f"trainer.v1.trainer_mode={TRAINER_MODE} needs an experiment; name it as verl-config does"
        )
    return described


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - verl's console log


def register_with_verl() -> None:
    """Register the trainer with verl."""
    register_trainer(TRAINER_MODE)(Trainer)
