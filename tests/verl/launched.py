"""Runs of verl's `main_ppo` on this machine's CPU: two ranks, two steps, everything else as verl has it."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tiny

from fp4rl.engines.verl.configuration import decided
from fp4rl.engines.verl.hydra import written
from fp4rl.engines.verl.settings import overrides
from fp4rl.spec.load import load_spec


@dataclass(frozen=True)
class Run:
    folder: Path
    code: int
    log: str

    @property
    def left(self) -> Path:
        """Where the plug-in and verl leave what is kept."""
        return self.folder / "checkpoints"


def main_ppo(folder: Path, *more: str, spec: Path | None = None, timeout: float = 900) -> Run:
    """Run it in `folder`, under the experiment `spec` where one is given."""
    model = folder / "model"
    if not model.exists():
        tiny.model(model)
    data = tiny.problems(folder, 8)
    (folder / "reward.py").write_text(tiny.REWARD)
    (folder / "held").mkdir(exist_ok=True)
    words = {
        "data.train_files": data,
        "data.val_files": data,
        "data.val_max_samples": 2,
        "data.dataloader_num_workers": 0,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2,
        "actor_rollout_ref.rollout.name": "transformers",
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 2,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": folder / "reward.py",
        "reward.custom_reward_function.name": "compute_score",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "trainer.n_gpus_per_node": 2,
        "trainer.nnodes": 1,
        "trainer.total_epochs": 2,
        "trainer.logger": ["console"],
        "trainer.save_freq": 2,
        "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "hf_model"],
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.default_local_dir": folder / "checkpoints",
        "ray_kwargs.ray_init.num_cpus": 32,
        "+ray_kwargs.ray_init.num_gpus": 2,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.object_store_memory": 200_000_000,
    }
    if spec is not None:
        words |= decided(load_spec(spec))
    under = overrides(spec) if spec is not None else ()
    command = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        *(f"{k}={written(v)}" for k, v in words.items()),
        *under,
        *more,
    ]
    environment = os.environ | {
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
        "VERL_ON_CPU_KEEPS": str(folder / "held"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HYDRA_FULL_ERROR": "1",
    }
    log = folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, check=False
        )
    return Run(folder, done.returncode, log.read_text(errors="replace"))


def merged(actor: Path, target: Path) -> None:
    """Join what the ranks saved, by verl's own tool."""
    words = ["merge", "--backend", "fsdp", "--local_dir", str(actor), "--target_dir", str(target)]
    environment = os.environ | {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu"}
    subprocess.run([sys.executable, "-m", "verl.model_merger", *words], env=environment, check=True)
