"""What verl cannot express of an experiment, and what means something else there.

What its configuration can express and the plug-in cannot do stands in `limits`.
"""

from collections.abc import Iterator

from fp4rl.engines.verl.configuration import lora_alpha, micro_batch, per_device, policy_loss
from fp4rl.engines.verl.machines import Machine
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.model import Lora
from fp4rl.spec.training import Training


def require_expressible(experiment: Experiment, devices: int) -> None:
    """Raise InvalidValueError, naming the first key that verl cannot express and the number of others."""
    problems = [
        *_model(experiment),
        *_training(experiment.training),
        *_around(experiment),
        *_shares(experiment, devices),
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InvalidValueError(f"verl cannot run this: {problems[0]}{more}")


def _model(experiment: Experiment) -> Iterator[str]:
    model = experiment.model
    if model.path is None:
        yield "model.embedded: verl loads a Hugging Face folder; name one in model.path"
    if model.experts_implementation is not None:
        yield "model.experts_implementation: verl chooses how experts are computed; leave it out"
    if model.transforms:
        yield "model.transforms: verl loads the folder as it is; transform it first (docs/concepts/transforms.md)"
    if model.lora is not None:
        yield from _lora(model.lora)


def _lora(lora: Lora) -> Iterator[str]:
    alpha = lora_alpha(lora.rank, lora.alpha, rslora=lora.rslora)
    if lora.dropout:
        yield "model.lora.dropout: verl sets none; write 0"
    if alpha != round(alpha):
        why = f" (alpha times the root of rank is {alpha:.4g})" if lora.rslora else ""
        yield f"model.lora.alpha {lora.alpha:g}: verl's lora_alpha is a whole number{why}; take one that gives it"


def _training(recipe: Training) -> Iterator[str]:
    if policy_loss(recipe) is None:
        yield f"training.algorithm {recipe.algorithm}: verl has no such policy loss; take dapo, grpo, gspo or cispo"
    if recipe.lr_scheduler == "linear":
        yield "training.lr_scheduler linear: verl has constant and cosine; take one of them"
    if recipe.optimizer != "adamw" or recipe.betas != Training().betas:
        yield "training.optimizer and betas: verl is started with torch's AdamW and its usual betas; leave them out"
    if recipe.mask_truncated:
        yield "training.mask_truncated: verl trains on answers that were cut off; write false (overlong_buffer acts)"
    beside = {
        "ema": "keeps no average of its weights",
        "oscillation": "updates shards, whose codes are not followed",
        "learned_clipping": "has no weights beside its own that could be clamped",
    }
    for key, why in beside.items():
        if getattr(recipe, key) is not None:
            yield f"training.{key}: verl {why}; leave it out"
    if recipe.deployed != "last":
        yield "training.deployed: verl keeps every checkpoint, and the last is imported; write last"
    if recipe.stop:
        yield "training.stop: verl's rollouts end at the end of text alone; leave it out"
    if recipe.routing_replay:
        yield "training.routing_replay: verl replays routes on Megatron and VeOmni, not on FSDP; write false"


def _around(experiment: Experiment) -> Iterator[str]:
    evaluation, recipe, noise = experiment.evaluation, experiment.training, experiment.noise
    if experiment.start is not None:
        yield "start: verl starts from the folder in model.path; name the folder `final` of that run there"
    if evaluation.max_new_tokens != recipe.max_response_length:
        yield (
            f"evaluation.max_new_tokens {evaluation.max_new_tokens}: verl validates with the length of its rollouts; "
            f"write {recipe.max_response_length}, training.max_response_length"
        )
    if experiment.rollout.server is not None:
        yield "rollout.server: verl starts its own servers; leave it out"
    if noise is not None and noise.logprobs == "noisy" and policy_loss(recipe) != "vanilla":
        yield f"noise.logprobs noisy: verl then has PPO's loss alone, not that of {recipe.algorithm}; write clean"


def _shares(experiment: Experiment, devices: int) -> Iterator[str]:
    recipe = experiment.training
    answers = recipe.mini_batch_size * recipe.rollout_n
    if answers % devices:
        yield (
            f"training.mini_batch_size {recipe.mini_batch_size} x rollout_n {recipe.rollout_n} = {answers} answers do "
            f"not divide over {devices} devices; take multiples of {devices}, or --devices"
        )


def differences(experiment: Experiment, machine: Machine, devices: int) -> Iterator[str]:
    """Yield a line for everything of the experiment that verl does in another way."""
    recipe, evaluation = experiment.training, experiment.evaluation
    yield "verl draws the order of problems by its own generator (data.seed), and answers without a seed"
    if experiment.rollout.engine != "vllm" and machine.name != "cpu":
        yield f"rollout.engine {experiment.rollout.engine}: verl samples with vLLM"
    wanted, micro = recipe.micro_batch_size, micro_batch(recipe, devices)
    if wanted != micro and micro != per_device(recipe, devices):
        yield f"training.micro_batch_size {wanted or 'whole'} is {micro} answers a device: memory, not the result"
    if recipe.updates_per_step > 1 and (recipe.lr_warmup_steps or recipe.lr_scheduler == "cosine"):
        yield "the learning rate changes once a step, after all of its updates, not with each of them"
    if recipe.filters:
        yield (
            "training.filter_groups.max_num_gen_batches: verl's present trainer reads no limit; it generates until "
            f"{recipe.train_batch_size} groups have spread, and hangs where none ever has"
        )
    if recipe.overlong is not None:
        yield "verl punishes overlong answers in validation as well: read val-core/.../acc, not reward"
    precisions = ", ".join(evaluation.all_profiles)
    yield (
        f"evaluation.profiles {precisions}: verl judges at one precision, that of its rollout; "
        "`fp4rl eval` judges its checkpoints at the others"
    )
    if evaluation.stop or (evaluation.stop is None and experiment.task.stop):
        yield "evaluation.stop: verl answers on to the limit; the reward reads the text before it"
    kept = "training.save_total_limit: verl keeps every checkpoint"
    yield kept if recipe.save_freq else "training.save_freq 0: verl keeps the last step"
    if (
        experiment.model.coarse_masters is False
        and experiment.model.lora
        and experiment.model.master_dtype != "float32"
    ):
        yield f"model.master_dtype {experiment.model.master_dtype}: verl keeps adapters in it too"
