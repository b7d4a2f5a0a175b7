"""vLLM in this process and as a server, both for a tiny model with weights that are far from the grid.

Where vLLM is not installed the tests skip, and this folder is not on the path: fixtures import what lies beside them.
"""

import pytest
import torch

from fp4rl.engines.rollout.server import VllmServer
from fp4rl.engines.rollout.vllm import Vllm
from fp4rl.models.load import load
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.model import Embedded


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("model"), build_tokenizer()
    torch.manual_seed(0)
    model = build(Embedded(), tokenizer)
    for weight in (p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name):
        torch.nn.init.normal_(weight, std=0.06)  # far from the grid, and inputs that matter
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def policy(folder):
    return load(folder)


@pytest.fixture(scope="module")
def engine():
    from scores import let_go

    one = Vllm()
    yield one
    let_go(one)


@pytest.fixture(scope="session")
def address(folder, tmp_path_factory):
    """A running server of `folder`, in whose worker faults can be planted."""
    from processes import free_port, serving

    port = free_port()
    with serving(folder, port, tmp_path_factory.mktemp("server") / "log.txt"):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def remote(address):
    """The sampler of that server."""
    one = VllmServer(address)
    yield one
    one.server.worker("fp4rl_plant", "none")
