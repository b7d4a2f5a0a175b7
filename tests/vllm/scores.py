"""Answers of rollouts, and how far vLLM's log-probabilities of their tokens are from those of a model."""

import gc
import json
from contextlib import contextmanager

import torch

from fp4rl.cli.main import main
from fp4rl.inject.attach import attach
from fp4rl.rl.generate import Sampling

SAMPLED = Sampling(20, 1.0, count=2, logps=True)


def prompts(tokenizer):
    return [tokenizer(f"{a} + {b} = ")["input_ids"] for a in (2, 13, 40) for b in (3, 7, 25, 11)]


@contextmanager
def rollout(model, injection):
    """The attachment of an injection in the phase of rollouts."""
    with attach(model, injection) as attachment:
        attachment.set_phase("rollout")
        yield attachment


def fed(asked, answers):
    """What the model computes for each answer: its prompt and all of it but the last token, which is drawn alone."""
    return [asked[number // SAMPLED.count] + answer.tokens[:-1] for number, answer in enumerate(answers)]


def scored(model, asked, answers):
    """The log-probability of every token in this model, in one pass over each answer."""
    rows = []
    with torch.no_grad():
        for number, answer in enumerate(answers):
            prompt = asked[number // SAMPLED.count]
            logits = model(torch.tensor([prompt + answer.tokens])).logits[0].double().log_softmax(-1)
            rows.append(logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer.tokens)[:, None]).squeeze(-1))
    return torch.cat(rows)


def distances(model, asked, answers, score=scored):
    """|log-probability in vLLM - in this model| of every token."""
    return (score(model, asked, answers) - torch.cat([answer.logps for answer in answers])).abs()


def near(model, asked, answers, score=scored):
    """The share of tokens whose log-probability in vLLM is within 1e-4 of that in this model."""
    return float((distances(model, asked, answers, score) < 1e-4).double().mean())


def load_into(engine, weights):
    """Load weights as vLLM alone does it."""
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    worker.model_runner.reload_weights(weights_iterator=iter([(n, t.clone()) for n, t in weights]))


def let_go(engine):
    """One engine at a time: what goes last takes the groups of processes with it."""
    engine._llm = None
    gc.collect()


def audited(capsys, *words, code=0):
    """The checks that `fp4rl parity` makes of six short answers, by name, and what it says on stderr."""
    assert main(["parity", *map(str, words), "--count", "6", "--max-new-tokens", "8", "--json"]) == code
    said = capsys.readouterr()
    return {check["name"]: check for check in json.loads(said.out)["checks"]}, said.err
