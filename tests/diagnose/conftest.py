"""Two trained models of one shape: one that is trained here within seconds, and the Llama of the shared data."""

import importlib.util
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM

from fp4rl.diagnose.calibration import from_tokens
from fp4rl.diagnose.scan import scan
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.injection import Injection
from fp4rl.tasks.arithmetic import Arithmetic

LENGTH, STEPS = 32, 120


@pytest.fixture(scope="session")
def tokens():
    """Problems of the arithmetic task with their solutions, one after the other, in rows of 32 tokens."""
    tokenizer = build_tokenizer()
    texts = [f"{p.prompt} {p.solution}{tokenizer.eos_token}" for p in Arithmetic().problems("train", 1200)]
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    return [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]


@pytest.fixture(scope="session")
def trained(tokens, shared_tmp):
    """A Llama of 260 thousand parameters, trained on the arithmetic task until its weights are no noise any more.

    The first worker that asks trains it; the others read what it wrote.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(build_tokenizer()),
        hidden_size=64,
        intermediate_size=172,  # 32 does not divide it
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model, file = LlamaForCausalLM(config), shared_tmp / "trained-of-diagnose.pt"
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            train(model, torch.tensor(tokens))
            torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file))
    return model.eval()


def train(model, rows):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
    for step in range(STEPS):
        batch = rows[(32 + 32 * step) % (len(rows) - 32) :][:32]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.zero_grad(set_to_none=True)


@pytest.fixture(scope="session")
def stories(shared_data):
    """The trained Llama of the shared data, whose figures are published."""
    where = Path(__file__).with_name("stories260k.py")
    spec = importlib.util.spec_from_file_location("stories260k", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_stories(shared_data / "stories260K")


@pytest.fixture(scope="session")
def calibration(tokens):
    return from_tokens(tokens[:32], batch_size=16)


@pytest.fixture(scope="session")
def w4a4(trained, calibration):
    """One whole scan that several tests read."""
    return scan(trained, Injection.named("w4a4"), texts=calibration)
