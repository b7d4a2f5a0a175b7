"""`fp4rl plan --show-prompt`: what the model sees of problem 1, in full."""

import json
import shutil

import pytest

from fp4rl.cli.main import main
from fp4rl.models.load import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def spec(tmp_path, embedded_model):
    """A suite on a model folder with a chat template and a table of sums."""
    folder = shutil.copytree(embedded_model, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    rows = [{"question": f"{n} + 1 ?", "answer": n + 1} for n in range(60)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "table", "path": str(tmp_path / "qa.jsonl"), "prompt": "{question}", "system": "Add."}
    suite = {
        "suite": "sums",
        "base": {"model": {"path": str(folder)}, "task": task},
        "arms": {"auto": {}, "w4a16": {"injection": "w4a16"}, "plain": {"task.chat": False}},
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(suite))
    return tmp_path / "sums.yaml"


def test_text_and_token_ids_of_problem_1_are_shown_once_for_the_arms_that_share_them(spec, capsys):
    assert main(["plan", str(spec), "--show-prompt", "--json"]) == 0
    auto, plain = json.loads(capsys.readouterr().out)
    assert (auto["arms"], plain["arms"]) == (["auto", "w4a16"], ["plain"])
    assert (auto["chat_template"], plain["chat_template"]) == (True, False)
    question = plain["text"].removeprefix("Add.\n\n")
    assert auto["text"] == f"[system] Add.\n[user] {question}\n[assistant] "
    assert auto["template_adds"] == ["[system] ", "\n[user] ", "\n[assistant] "]
    assert int(auto["gold"]) == int(question.split()[0]) + 1
    tokenizer = load_tokenizer(spec.parent / "model")
    for prompt in (auto, plain):
        assert prompt["token_ids"] == tokenizer(prompt["text"])["input_ids"]


def test_plan_says_that_a_template_is_applied_and_how_to_see_it(spec, capsys):
    assert main(["plan", str(spec)]) == 0
    assert "prompts: by the folder's chat template; --show-prompt shows" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", str(spec), "--show-prompt"]) == 0
    out = capsys.readouterr().out
    assert "[user]" in out
    assert "token ids: " in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_embedded_model_and_a_missing_folder_have_an_answer_too(spec, capsys):
    assert main(["plan", "catalogue/quickstart", "--show-prompt", "--json"]) == 0
    (prompt,) = json.loads(capsys.readouterr().out)
    assert prompt["text"].startswith("Q: ")
    assert prompt["template_adds"] == []
    assert main(["plan", str(spec), "model.path=gone", "--show-prompt"]) == 2
    assert "model.path: gone does not exist" in capsys.readouterr().err
