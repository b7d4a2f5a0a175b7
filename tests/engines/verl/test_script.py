"""What is written for verl: a script that a shell hands on word for word, problems, and the reward of their answers."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fp4rl.engines.verl import data, reward
from fp4rl.engines.verl.configuration import Files
from fp4rl.engines.verl.machines import CPU, GPU
from fp4rl.engines.verl.script import for_verl, verl_run, write_run
from fp4rl.lab.matrix import single
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.prompts import token_ids
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import load_spec
from fp4rl.tasks.table import Table


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("it's a model")
    build_tokenizer().save_pretrained(folder)
    return folder


def run_of(model, **training):
    recipe = {"train_batch_size": 8, "mini_batch_size": 4, "rollout_n": 4, "max_prompt_length": 80} | training
    content = {"model": {"path": str(model)}, "training": recipe, "evaluation": {"count": 5}}
    return for_verl(single(Experiment.model_validate(content), "mine"))


@pytest.fixture
def written(model, tmp_path):
    """The files of a run, and what verl is asked for."""
    files = Files(tmp_path / "with blanks.sh")
    asked = verl_run(run_of(model), CPU, None, files)
    write_run(asked, files)
    return files, asked


def test_a_shell_hands_every_override_on_word_for_word(written, tmp_path):
    files, asked = written
    fake = tmp_path / "python"
    report = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{report}" "$@"\n')
    fake.chmod(0o755)
    command = ["bash", str(files.script), "trainer.nnodes=2"]
    done = subprocess.run(command, env={"PYTHON": str(fake), "PATH": "/usr/bin:/bin"}, capture_output=True, check=True)
    words, variables = json.loads(done.stdout)
    assert words == ["-m", "verl.trainer.main_ppo", *asked.overrides, "trainer.nnodes=2"]
    assert {name: variables[name] for name in asked.variables} == asked.variables
    assert variables["VERL_PLATFORM"] == "cpu"


def test_the_experiment_beside_it_is_the_one_whose_id_verl_gets(written):
    files, asked = written
    described = load_spec(files.spec)
    assert described == asked.run.experiment
    assert described.engine == "verl"
    assert asked.configuration["trainer.experiment_name"] == single(described, "mine").run_id


def test_problems_have_verls_columns_and_come_back(written):
    files, asked = written
    task = asked.run.experiment.task
    for file, problems in ((files.train, task.problems("train")), (files.validation, task.problems("test", 5))):
        rows = pq.read_table(file).to_pylist()
        assert [row["prompt"] for row in rows] == [[{"role": "user", "content": p.prompt}] for p in problems]
        assert [row["reward_model"]["ground_truth"] for row in rows] == [p.answer for p in problems]
        assert [row["extra_info"]["id"] for row in rows] == [p.id for p in problems]
        assert {row["data_source"] for row in rows} == {"arithmetic"}


def test_the_template_gives_the_tokens_that_a_prompt_has(model, tmp_path):
    problem = run_of(model).experiment.task.problems("train", 1)[0]
    tokenizer = build_tokenizer()
    assert data.chat_template(model, [problem]) == data.AS_WRITTEN
    begins = {"bos_token": "<bos>", "special_tokens": ["<bos>"]}
    tokenizer.add_special_tokens({"bos_token": begins["bos_token"]})
    from tokenizers.processors import TemplateProcessing

    at = tokenizer.convert_tokens_to_ids("<bos>")
    pieces = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", at)])
    tokenizer.backend_tokenizer.post_processor = pieces
    tokenizer.save_pretrained(tmp_path)
    assert data.chat_template(tmp_path, [problem]) == f"<bos>{data.AS_WRITTEN}"
    behind = TemplateProcessing(single="$A <bos>", special_tokens=[("<bos>", at)])
    tokenizer.backend_tokenizer.post_processor = behind
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvalidValueError, match="only before a text"):
        data.chat_template(tmp_path, [problem])


def test_prompts_that_are_too_long_and_batches_that_are_too_large_are_refused(model):
    with pytest.raises(InvalidValueError, match="max_prompt_length"):
        data.splits(run_of(model, max_prompt_length=3).experiment)
    with pytest.raises(InvalidValueError, match="lower it"):
        data.splits(run_of(model, train_batch_size=8000).experiment)


def test_devices_are_those_of_the_experiment_else_of_the_machine(model, tmp_path):
    files = Files(tmp_path / "x.sh")
    assert verl_run(run_of(model), GPU, None, files).configuration["trainer.n_gpus_per_node"] == 8
    assert verl_run(run_of(model), GPU, 2, files).configuration["trainer.n_gpus_per_node"] == 2
    four = run_of(model).experiment.model_copy(update={"processes": 4})
    found = verl_run(single(four, "mine"), CPU, None, files).configuration
    assert found["trainer.n_gpus_per_node"] == found["+ray_kwargs.ray_init.num_gpus"] == 4


def test_a_model_that_is_not_here_is_told(tmp_path):
    asked = verl_run(run_of(tmp_path / "elsewhere"), GPU, None, Files(tmp_path / "x.sh"))
    assert any("not on this machine" in line for line in asked.differences)


def constant(*, completion, **_):
    """A reward of a package on the path."""
    return {"half": 0.5, "none": None}[completion]


@pytest.fixture
def rewarded(model, tmp_path, monkeypatch):
    """`rewarded(reward, stop)` -> compute_score of a run with them, as verl calls it for an answer."""
    run = run_of(model)
    problem = run.experiment.task.problems("train", 1)[0]

    def asked(name="accuracy", stop=None):
        recipe = run.experiment.training.model_copy(update={"reward": name})
        judged = run.experiment.evaluation.model_copy(update={"stop": stop})
        experiment = run.experiment.model_copy(update={"training": recipe, "evaluation": judged})
        files = Files(tmp_path / "r.sh")
        write_run(verl_run(replace(run, experiment=experiment), CPU, 2, files), files)
        monkeypatch.setenv("FP4RL_VERL_SPEC", str(files.spec))
        reward._reward.cache_clear()
        return lambda text, split="train": reward.compute_score(
            data_source="arithmetic",
            solution_str=text,
            ground_truth=problem.answer,
            extra_info={"id": problem.id, "prompt": problem.prompt, "split": split, "num_turns": 2},
        )

    yield asked, problem
    reward._reward.cache_clear()


def test_an_answer_earns_what_the_experiments_reward_gives(rewarded):
    asked, problem = rewarded
    score = asked()
    assert score(problem.solution) == {"score": 1.0, "acc": 1.0, "flexible": 1.0, "formatted": 1.0}
    assert score("no number") == {"score": 0.0, "acc": 0.0, "flexible": 0.0, "formatted": 0.0}


def test_a_reward_of_ones_own_is_called_and_acc_stays_the_tasks(rewarded):
    asked, _ = rewarded
    score = asked(f"{__name__}.constant")
    assert score("half") == {"score": 0.5, "acc": 0.0, "flexible": 0.0, "formatted": 0.0}
    with pytest.raises(CheckFailed, match="judged none"):
        score("none")


def test_validation_reads_an_answer_up_to_its_stop_text(rewarded):
    asked, problem = rewarded
    score = asked(stop=("Q:",))
    longer = f"no idea Q: {problem.solution}"
    assert score(longer, "test")["acc"] == 0.0
    assert score(longer, "train")["acc"] == 1.0  # rollouts end at the limit or the end token alone, as in `fp4rl run`


def test_a_process_without_the_experiment_says_how_it_is_started(monkeypatch):
    monkeypatch.delenv("FP4RL_VERL_SPEC", raising=False)
    reward._reward.cache_clear()
    with pytest.raises(NotFoundError, match="verl-config"):
        reward._reward()
    assert Path(data.__file__).is_file()


def test_a_models_chat_template_reaches_verl_as_the_trainer_applies_it(model, tmp_path):
    """The kind: verl would train on plain prompts, and fp4rl would judge by the template."""
    folder = shutil.copytree(model, tmp_path / "chats")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} [assistant]"
    tokenizer.save_pretrained(folder)
    rows = [{"question": f"{n} + 1 ?", "answer": n + 1} for n in range(60)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = run_of(folder, max_prompt_length=200).experiment
    task = Table(path=str(tmp_path / "qa.jsonl"), prompt="{question}", system="Add.")
    experiment = experiment.model_copy(update={"task": task})
    problems = task.problems("train")
    seen = data.as_seen(experiment, problems)
    assert seen[0].prompt == f"[system] Add.[user] {problems[0].question} [assistant]"
    template = data.chat_template(folder, seen)
    for problem, shown in zip(problems, seen, strict=True):
        message = [{"role": "user", "content": shown.prompt}]
        ids = tokenizer.apply_chat_template(message, chat_template=template, return_dict=False)
        assert ids == token_ids(tokenizer, [problem])[0]
