"""Nothing in a model folder but what ends an answer reaches a generation: neither a rollout nor an evaluation."""

import json
import shutil

import pytest
import torch

from fp4rl.models.fit import end_ids
from fp4rl.models.load import load
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.evaluate import answer
from fp4rl.rl.generate import Sampling, transformers_sampler
from fp4rl.rl.lora import with_lora
from fp4rl.rl.rollout import roll_out, seed_rollout
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.model import Embedded, Lora
from fp4rl.tasks.arithmetic import Arithmetic

# What folders of published models carry, and what would change every answer.
LEAKING = {"repetition_penalty": 5.0, "temperature": 0.1, "top_k": 1, "top_p": 0.5, "min_new_tokens": 9, "min_p": 0.2}
PROBLEMS = Arithmetic().problems("test", 4)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings") / "model"
    tokenizer = build_tokenizer()
    # wide weights: a model that is sure of what it says next, and says some tokens again
    build(Embedded(num_layers=1, initializer_range=0.4), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def altered(clean, folder, **settings):
    shutil.copytree(clean, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def answers(folder, samples=1):
    model, tokenizer = load(folder)
    decoding = Evaluation(max_new_tokens=NEW_TOKENS, samples=samples)
    return [
        (i.completion, i.length, i.truncated) for i in answer(model, tokenizer, PROBLEMS, Arithmetic().score, decoding)
    ]


@pytest.mark.parametrize("samples", [1, 3])
def test_the_folders_generation_settings_do_not_change_an_answer(samples, clean, tmp_path):
    assert answers(altered(clean, tmp_path / "leaking", **LEAKING), samples) == answers(clean, samples)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_sampler_is_the_model_whatever_the_folder_says(adapted, clean, tmp_path):
    folder = altered(clean, tmp_path / "leaking", **LEAKING)
    model, tokenizer = load(folder)
    if adapted:
        model = with_lora(model, Lora(rank=2), folder).eval()
    seed_rollout(0, 0)
    asked = Sampling(NEW_TOKENS, temperature=1.0, logps=True)
    found = roll_out(transformers_sampler, model, tokenizer, PROBLEMS, asked)
    for prompt, (tokens, _, _, logps, _) in zip(found.prompt_ids, found.answers, strict=True):
        with torch.no_grad():
            scored = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(logps, scored.gather(-1, torch.tensor(tokens)[:, None])[:, 0], atol=1e-3, rtol=0)


def test_a_folder_that_is_saved_again_carries_none_of_it(clean, tmp_path):
    model, _ = load(altered(clean, tmp_path / "leaking", **LEAKING))
    model.save_pretrained(tmp_path / "saved")
    assert not LEAKING.keys() & json.loads((tmp_path / "saved" / "generation_config.json").read_text()).keys()


def test_rollouts_and_evaluations_end_an_answer_at_the_same_tokens(clean, tmp_path):
    """The folder names a second end token, one that the model says early on."""
    model, tokenizer = load(clean)
    first = tokenizer(answers(clean)[0][0])["input_ids"][1]
    assert end_ids(model) == [tokenizer.eos_token_id] != [first]
    folder = altered(clean, tmp_path / "two", eos_token_id=[first])
    model, tokenizer = load(folder)
    assert end_ids(model) == [tokenizer.eos_token_id, first]
    judged = answers(folder)
    assert judged[0][1:] == (2, False) != answers(clean)[0][1:]
    drawn = roll_out(transformers_sampler, model, tokenizer, PROBLEMS, Sampling(NEW_TOKENS))
    assert [len(answer.tokens) for answer in drawn.answers] == [length for _, length, _ in judged]
    assert [not answer.ended for answer in drawn.answers] == [truncated for *_, truncated in judged]


def test_a_model_that_never_ends_is_refused_where_it_is_to_answer(clean):
    model, _ = load(clean)
    model.generation_config.eos_token_id = None
    with pytest.raises(InvalidValueError, match="no token ends an answer"):
        end_ids(model)
