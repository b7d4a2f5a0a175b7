"""What all tests share: the public data beside the checkout, and quiet libraries."""

import os
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():  # Triton's interpreter is chosen before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time, so that what is tested does not hang on luck; HYPOTHESIS_PROFILE=explore draws others.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

SHARED = Path(os.environ.get("FP4RL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data (GSM8K, a trained small Llama, test vectors, logs); skips without it."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not here; set FP4RL_SHARED_DATA to it")
    return SHARED


def pytest_addoption(parser):
    parser.addoption("--turn", help="K/N: of the slow tests, only those whose turn K (from 0) of N it is")


def pytest_collection_modifyitems(config, items):
    """Every slow test belongs to one of N turns, so that N runs in a row have run them all."""
    turn = config.getoption("--turn")
    if turn is None:
        return
    this, of = (int(part) for part in turn.split("/"))
    out = [i for i in items if i.get_closest_marker("slow") and crc32(i.nodeid.encode()) % of != this % of]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
