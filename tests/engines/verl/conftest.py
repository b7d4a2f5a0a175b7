"""What the tests of the plug-in for verl share."""

import pytest
import torch

from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.model import Embedded


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(Embedded(), build_tokenizer())
