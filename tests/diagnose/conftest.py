"""The trained small Llama, and texts of its own kind as tokens."""

import importlib.util
from pathlib import Path

import pytest

from fp4rl.diagnose.calibration import from_tokens
from fp4rl.diagnose.scan import scan
from fp4rl.spec.injection import Injection


def _converter():
    where = Path(__file__).with_name("stories260k.py")
    spec = importlib.util.spec_from_file_location("stories260k", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stories(shared_data):
    return _converter().load_stories(shared_data / "stories260K")


@pytest.fixture(scope="session")
def story_tokens(shared_data):
    folder = shared_data / "stories260K"
    text = (folder / "tinystories_sample.txt").read_text().replace("\n", " ")
    ids = _converter().encode(folder, text)
    return [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)][:32]


@pytest.fixture(scope="session")
def calibration(story_tokens):
    return from_tokens(story_tokens, batch_size=16)


@pytest.fixture(scope="session")
def w4a4(stories, calibration):
    """One whole scan that several tests read."""
    return scan(stories, Injection.named("w4a4"), texts=calibration)
