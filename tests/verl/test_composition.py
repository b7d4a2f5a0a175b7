"""verl's own Hydra composition takes what `fp4rl verl-config` writes, and holds the experiment's values.

The oracle is the installed verl 0.9.1: its configuration, its validation and its classes. Its own environment runs
this (`make test-verl`); elsewhere it is skipped.
"""

from importlib.metadata import version
from pathlib import Path

import pytest

verl = pytest.importorskip("verl", reason="verl is not installed here: make test-verl")

from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from fp4rl.engines.verl import hydra  # noqa: E402
from fp4rl.engines.verl.configuration import Files, configuration  # noqa: E402
from fp4rl.engines.verl.machines import CPU, GPU, NPU  # noqa: E402
from fp4rl.engines.verl.script import VERSION  # noqa: E402
from fp4rl.lab.catalogue import described  # noqa: E402
from fp4rl.lab.matrix import planned, single  # noqa: E402
from fp4rl.models.tokenizer import build_tokenizer  # noqa: E402
from fp4rl.spec.experiment import Experiment  # noqa: E402

CONFIG = Path(verl.__file__).parent / "trainer/config"
KEYS = (Path(__file__).parents[1] / "data/verl/keys_0.9.1.txt").read_text().split()
LORA = {"rank": 16, "alpha": 32.0, "target_modules": ["q_proj", "v_proj"]}
TRAINING = {"train_batch_size": 16, "mini_batch_size": 8, "rollout_n": 4, "max_prompt_length": 64}
KINDS = {
    "dapo": {"algorithm": "dapo", "rollout_correction": {"rollout_is": "token", "mode": "mask"}},
    "grpo": {"algorithm": "grpo", "lr_scheduler": "cosine", "lr_warmup_steps": 1, "kl_loss_type": "k3+"},
    "dr_grpo": {"algorithm": "dr_grpo", "save_freq": 3, "clip_ratio_c": 4.0},
    "gspo": {"algorithm": "gspo", "rollout_correction": {"rollout_is": "sequence", "threshold": 3.0}},
    "cispo": {"algorithm": "cispo", "adv_estimator": "rloo", "filter_groups": {"metric": "reward"}},
}


def composed(*overrides):
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a configuration and a tokenizer, which verl's model class loads."""
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("it's a model")
    build_tokenizer().save_pretrained(folder)
    Qwen2Config(architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    return folder


def flat(content, above=""):
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def test_the_keys_that_fast_tests_know_are_verls():
    assert version("verl") == VERSION
    own = dict(flat(OmegaConf.to_container(composed(), resolve=False)))
    parents = {key[:at] for key in own for at, mark in enumerate(key) if mark == "."}
    assert [key for key in KEYS if key not in own.keys() | parents] == []


@pytest.mark.parametrize("machine", [GPU, NPU, CPU], ids=lambda machine: machine.name)
@pytest.mark.parametrize("kind", KINDS)
def test_verl_composes_and_accepts_every_key_and_holds_its_value(kind, machine, model):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    lora = {"lora": LORA} if kind in ("dapo", "gspo") else {}
    content = {"model": {"path": str(model), "dtype": "bfloat16", **lora}, "training": TRAINING | KINDS[kind]}
    run = single(Experiment.model_validate(content), "mine")
    asked = configuration(run, machine, 4, Files(Path("/x y/run.sh")), "{{ bos_token }}'x' \\")
    config = composed(*hydra.words(asked))
    held = dict(flat(OmegaConf.to_container(config, resolve=True, throw_on_missing=False)))
    expected = dict(flat({key.lstrip("+"): value for key, value in asked.items()}))
    assert {key: held[key] for key in expected} == expected
    assert need_reference_policy(config) == (run.experiment.training.kl > 0)
    assert not need_critic(config)
    for part in (config.algorithm, config.actor_rollout_ref.rollout, config.actor_rollout_ref.model):
        omega_conf_to_dataclass(part)
    if config.actor_rollout_ref.rollout.name == "vllm":  # of vLLM it asks the greatest rank of an adapter alone
        config.actor_rollout_ref.rollout.name = "sglang"
    with pytest.warns(UserWarning, match="Disabled critic"):
        validate_config(config, need_reference_policy(config), need_critic(config))


@pytest.mark.parametrize(
    "text",
    [
        *("a b", 'it\'s "x" \\', "tail\\", "${x}", "\\${x}", "a\\\\${b}\\", "{{ a }}", 'a\\"b', "1", "1e5", "true"),
        *("a,b", "x=y", "", "pkg://a.b", "/a b/c.yaml", "a:b", "~/x", "é▁", "a#b", "[x]", "0.5_2.0", "(a)", "1_000"),
    ],
)
def test_hydra_reads_every_text_as_it_is(text):
    assert composed(f"trainer.project_name={hydra.written(text)}").trainer.project_name == text


def test_verl_reads_the_documented_experiment():
    run = next(run for run in planned(described("e13h", "full")) if run.arm == "e13h")
    config = composed(*hydra.words(configuration(run, GPU, 8, Files(Path("/x/run.sh")), "T")))
    assert (config.data.train_batch_size, config.actor_rollout_ref.rollout.n) == (128, 8)
    assert config.reward.reward_kwargs.overlong_buffer_cfg.penalty_factor == 0.5
    assert config.actor_rollout_ref.model.lora_rank == 32


def test_verl_sees_the_tokens_of_fp4rls_own_prompts(tmp_path, model):
    """verl's own data set and its own rendering, against the tokenizer that `fp4rl run` reads prompts with."""
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder

    from fp4rl.engines.verl import data
    from fp4rl.tasks.arithmetic import Arithmetic

    problems = Arithmetic().problems("train", 5)
    data.write(problems, "arithmetic", tmp_path / "train.parquet")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = data.chat_template(model, problems)
    config = composed("data.filter_overlong_prompts=False", f"+data.cache_dir={tmp_path}").data
    rows = RLHFDataset([str(tmp_path / "train.parquet")], tokenizer, config)
    assert [row["reward_model"]["ground_truth"] for row in rows] == [problem.answer for problem in problems]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    builder = ContinuousTokenBuilder(tokenizer)
    for row, problem in zip(rows, problems, strict=True):
        assert builder.build_initial_tokens(row["raw_prompt"]) == tokenizer(problem.prompt)["input_ids"]
