"""Old settings keep a meaning: scripts and YAML of the verl fork become parts of a description, traps are named."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fp4rl.engines.verl.configuration import Files, configuration
from fp4rl.engines.verl.machines import GPU
from fp4rl.engines.verl.old import recipe, require_agreement, rows_of, translate
from fp4rl.engines.verl.old_files import settings_in
from fp4rl.lab.catalogue import described
from fp4rl.lab.matrix import planned, single
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.noise import Noise

SCRIPT = Path(__file__).parents[2] / "data/verl/e13h.sh"
ERRORS = {"trainer.hw_error_injection.enabled": "True", "trainer.hw_error_injection.target_modules": '["linear"]'}
NOISE = {
    "trainer.noise_injection.enabled": "True",
    "trainer.noise_injection.sigma_start": "0.05",
    "trainer.noise_injection.sigma_end": "0.0005",
}


@pytest.fixture
def old_script(tmp_path):
    """The script of E13h over a file with as many rows as GSM8K has."""
    rows = tmp_path / "train.parquet"
    pq.write_table(pa.table({"row": list(range(7473))}), rows)
    script = tmp_path / "e13h.sh"
    script.write_text(SCRIPT.read_text().replace("TRAIN_FILES", str(rows)).replace("VAL_FILES", str(rows)))
    return script


@pytest.fixture
def both(old_script):
    """The documented experiment as its old settings describe it, and as our catalogue does."""
    settings, variables = settings_in(old_script)
    parts = recipe(settings, rows_of(settings))[0] | translate(settings, variables)[0]
    ours = next(run for run in planned(described("e13h", "full")) if run.arm == "e13h" and run.seed == 0)
    judged = ours.experiment.evaluation.model_dump(exclude={"test_freq"}, exclude_unset=True)
    given = {"task": ours.experiment.task, "evaluation": parts["evaluation"] | judged}
    return Experiment.model_validate(parts | given), ours.experiment, settings


def test_the_documented_experiment_is_the_same_from_its_old_settings_and_from_our_catalogue(both):
    old, ours, _ = both
    assert old.model_dump() == ours.model_dump()
    assert old == ours


def test_verl_is_asked_for_the_values_of_the_old_script_key_by_key(both):
    _, ours, settings = both
    asked = configuration(single(ours, "e13h"), GPU, 8, Files(Path("/x/run.sh")), "T")
    asked = {key.lstrip("+"): value for key, value in asked.items()}
    renamed = {"reward_model.overlong_buffer.": "reward.reward_kwargs.overlong_buffer_cfg."}
    renamed |= {"reward_model.reward_manager": "reward.reward_manager.name"}
    renamed |= {"actor_rollout_ref.actor.grad_clip": "actor_rollout_ref.actor.optim.clip_grad"}
    present = {}
    for key, text in settings.items():
        for before, after in renamed.items():
            key = key.replace(before, after)
        present[key] = yaml.safe_load(text) if text != "1e-5" else 1e-5
    ours_alone = {  # where it is stored, how memory is used; and what verl's present trainer does itself
        *("trainer.project_name", "trainer.experiment_name", "trainer.logger", "trainer.default_local_dir"),
        *("data.train_files", "data.val_files", "actor_rollout_ref.model.path", "trainer.total_epochs"),
        *("actor_rollout_ref.rollout.gpu_memory_utilization", "data.filter_overlong_prompts"),
    }
    same = {key for key in present.keys() & asked.keys() - ours_alone if key != "trainer.save_freq"}
    assert {key: asked[key] for key in same} == {key: present[key] for key in same}
    assert len(same) == 39
    assert (present["trainer.save_freq"], asked["trainer.save_freq"]) == (50, 29)  # verl keeps the last step in both
    added = {key for key in present if "hw_error_injection" in key}
    without = {"data.gen_batch_size", "actor_rollout_ref.model.use_remove_padding", "trainer.critic_warmup"}
    without |= {"actor_rollout_ref.rollout.enable_chunked_prefill"}
    without |= {
        f"actor_rollout_ref.{part}_offload" for part in ("actor.fsdp_config.param", "actor.fsdp_config.optimizer")
    }
    without |= {"actor_rollout_ref.ref.fsdp_config.param_offload"}
    assert present.keys() - asked.keys() == added | without


def test_translation_gives_parts_of_a_description():
    parts, warnings = translate(ERRORS | {"trainer.hw_error_injection.error_type": "mxfp4"} | NOISE, {})
    assert Injection.model_validate(parts["injection"]).input.name == "mxfp4"
    assert Noise.model_validate(parts["noise"]).schedule.sigma_start == 0.05
    assert any("on in validation" in line for line in warnings)
    assert any("BF16 swallows" in line for line in warnings)


def test_a_whole_configuration_is_read_for_what_the_fork_added_alone():
    assert translate({"data.train_batch_size": 8, "trainer.total_epochs": 3}, {"HOME": "/x"}) == ({}, ())
    parts, _ = translate({"data.train_batch_size": 8, "trainer.total_epochs": 3} | NOISE, {"HOME": "/x"})
    assert set(parts) == {"noise"}


def test_variables_and_the_trainers_copy_of_them_are_one_setting():
    env = {"VERL_NOISY_OPS_ENABLED": "1", "VERL_NOISY_OPS_SCALE": "5e-2"}
    copied = {"++trainer.noisy_ops.enabled": "True", "++trainer.noisy_ops.error_scale": "5e-2"}
    assert translate(copied, env)[0] == translate({}, env)[0] == translate(copied, {})[0]
    (error,) = Injection.model_validate(translate({}, env)[0]["injection"]).errors
    assert error.scale == 0.05


ROUNDS = ERRORS | {
    "trainer.hw_error_injection.error_type": "mxfp4",
    "trainer.hw_error_injection.injection_point": "weight",
}


def test_old_settings_beside_an_experiment_must_say_what_it_says():
    experiment = Experiment.model_validate({"model": {"path": "m"}, "injection": "w4a16"})
    assert require_agreement(experiment, {"trainer.total_epochs": 1}, {"HOME": "/x"}) == ()
    assert any("hooks swapped weights" in line for line in require_agreement(experiment, ROUNDS, {}))
    for other in (ROUNDS | NOISE, ROUNDS | {"trainer.hw_error_injection.seed": 3}):
        with pytest.raises(InvalidValueError, match="verl-config --from"):
            require_agreement(experiment, other, {})
    with pytest.raises(InvalidValueError, match="another injection"):
        require_agreement(experiment, {}, {"VERL_NOISY_OPS_ENABLED": "1"})


def test_old_variables_without_an_experiment_do_not_pass_for_noise(monkeypatch):
    monkeypatch.delenv("FP4RL_VERL_SPEC", raising=False)
    monkeypatch.delenv("VERL_NOISY_OPS_ENABLED", raising=False)
    from fp4rl.engines.verl import plugin

    plugin.apply()
    monkeypatch.setenv("VERL_NOISY_OPS_ENABLED", "1")
    with pytest.raises(InvalidValueError, match="verl-config --from"):
        plugin.apply()


def test_a_schedule_longer_than_the_run_is_told():
    steps = {"trainer.total_training_steps": 5, "trainer.noise_injection.num_stages": 10}
    assert any("5 steps do not reach" in line for line in translate(NOISE | steps, {})[1])


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"trainer.noise_injection.sigma_end": "0"}, "never reaches zero"),
        ({"trainer.noise_injection.num_stages": "2"}, "too few"),
        ({"trainer.noise_injection.sigma_trend": "[1]"}, "computed by the trainer"),
        ({"trainer.noise_injection.sigma_strat": "1"}, "did you mean 'sigma_start'"),
    ],
)
def test_settings_that_never_could_act_are_refused(more, wrong):
    with pytest.raises(InvalidValueError, match=wrong):
        translate(NOISE | more, {})


GRPO = {"algorithm.adv_estimator": "grpo", "actor_rollout_ref.rollout.n": "5"}


def test_verls_own_defaults_are_written_out():
    training = recipe(GRPO)[0]["training"]
    own = {"train_batch_size": 1024, "mini_batch_size": 256, "weight_decay": 0.01, "clip_ratio_c": 3.0, "rollout_n": 5}
    assert {key: training[key] for key in own} == own
    assert training["algorithm"] == "grpo"
    assert training["kl_loss_coef"] == 0.0
    assert training["overlong_buffer"] == {"enable": False}
    assert training["steps"] is None  # which `fp4rl plan` refuses: nobody knows how many rows there are


def test_a_step_is_a_batch_of_rows():
    training, lines = (recipe(GRPO | {"trainer.total_epochs": "2"}, rows=3000)[0]["training"], recipe(GRPO)[1])
    assert training["steps"] == 3000 // 1024 * 2
    assert any("name training.steps" in line for line in lines)
    assert recipe(GRPO | {"trainer.total_training_steps": "17"})[0]["training"]["steps"] == 17


def test_what_has_no_counterpart_is_named():
    (line,) = [line for line in recipe(GRPO | {"critic.optim.lr": "1"})[1] if "no counterpart" in line]
    assert "critic.optim.lr" in line


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"algorithm.adv_estimator": "gae"}, "needs a critic"),
        ({"algorithm.use_kl_in_reward": "True"}, "KL in the loss"),
        (
            {
                "algorithm.rollout_correction.rollout_is": "token",
                "algorithm.rollout_correction.rollout_is_threshold": "0.5_5",
            },
            "take one T",
        ),
    ],
)
def test_recipes_that_fp4rl_has_not_are_refused(more, wrong):
    with pytest.raises(InvalidValueError, match=wrong):
        recipe(GRPO | more)


def test_a_recipe_comes_back_as_it_was_written():
    run = next(run for run in planned(described("e13h", "full")) if run.arm == "e13h")
    asked = configuration(run, GPU, 8, Files(Path("/x/run.sh")), "T")
    again = recipe({key.lstrip("+"): value for key, value in asked.items()})[0]
    assert Experiment.model_validate(again | {"task": run.experiment.task}).training == run.experiment.training


SHELL = """
export WANDB_MODE=offline
N_GPUS=${2:-8}
SCALE=${1:-5e-2}
export VERL_NOISY_OPS_ENABLED=1   # on
export VERL_NOISY_OPS_SCALE=${SCALE}
MODEL_PATH=${MODEL_PATH:-"/models/m"}
# trainer.hw_error_injection.enabled=True
COMMON_ARGS="
    data.train_batch_size=128
    actor_rollout_ref.model.path=${MODEL_PATH}
    trainer.n_gpus_per_node=${N_GPUS}
    trainer.project_name=$(hostname)
"
python3 -m verl.trainer.main_ppo ${COMMON_ARGS} \\
    '++trainer.noise_injection.layer_types=["rmsnorm"]' \\
    ++trainer.noise_injection.enabled=True \\
    trainer.experiment_name=e8c_${SCALE} 2>&1 | tee x.log
"""


def test_a_script_is_read_with_its_variables_filled_in(tmp_path):
    file = tmp_path / "old.sh"
    file.write_text(SHELL)
    settings, variables = settings_in(file)
    assert settings == {
        "data.train_batch_size": "128",
        "actor_rollout_ref.model.path": "/models/m",
        "trainer.n_gpus_per_node": "8",
        "trainer.noise_injection.layer_types": '["rmsnorm"]',
        "trainer.noise_injection.enabled": "True",
        "trainer.experiment_name": "e8c_5e-2",
    }
    assert variables == {"VERL_NOISY_OPS_ENABLED": "1", "VERL_NOISY_OPS_SCALE": "5e-2"}


def test_yaml_is_read_like_a_script(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("trainer: {noise_injection: {enabled: true, sigma_start: 0.05}}\nVERL_NOISY_OPS_ENABLED: 1\n")
    settings, variables = settings_in(file)
    assert settings == {"trainer.noise_injection.enabled": True, "trainer.noise_injection.sigma_start": 0.05}
    assert variables == {"VERL_NOISY_OPS_ENABLED": "1"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("echo hello\n", "holds no setting of verl"),
        ("python x a.b='1\n", "quotation mark"),
        ("python x trainer.noise_injection.sigma_start=${SIGMA}\n", "only a shell knows"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, text, wrong):
    file = tmp_path / "old.sh"
    file.write_text(text)
    with pytest.raises(InvalidValueError, match=wrong):
        settings_in(file)
