"""What all tests share: the public data beside the checkout, and quiet libraries."""

import gc
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from time import monotonic
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two workers of two threads on two cores spend most of their time waiting for each other between tiny operations. Tests
# of what threads change ask for theirs (`torch.set_num_threads`).
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():  # Triton's interpreter is chosen before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time, so that what is tested does not hang on luck; HYPOTHESIS_PROFILE=explore draws others.
# `make fuzz` takes `nightly`; CI takes `turn`, with a seed that every commit moves on (.ci/run).
_AT_ANY_SPEED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, **_AT_ANY_SPEED)
settings.register_profile("explore", **_AT_ANY_SPEED)
settings.register_profile("turn", max_examples=200, database=None, print_blob=True, **_AT_ANY_SPEED)
settings.register_profile(
    "nightly", max_examples=int(os.environ.get("FUZZ", "10000")), print_blob=True, **_AT_ANY_SPEED
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

TESTS, BEGAN = Path(__file__).parent, monotonic()
SHARED = Path(os.environ.get("FP4RL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data (GSM8K, a trained small Llama, test vectors, logs); skips without it."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not here; set FP4RL_SHARED_DATA to it")
    return SHARED


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory) -> Path:
    """A folder that all workers of this run share, for what is made once and then only read."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def pytest_addoption(parser):
    parser.addoption("--turn", help="K/N: of the slow tests, only those whose turn K (from 0) of N it is")
    parser.addoption("--rooms", help="with --turn: also every slow test of these rooms; all, none, or such as rl,lab")
    parser.addoption("--minutes", type=float, help="slow tests that have not begun after so long are skipped")


def pytest_collection_modifyitems(config, items):
    """Of the slow tests, keep those of this turn and, after them, those of the named rooms.

    Every slow test belongs to one of N turns, so that N turns have run them all. The rooms' tests begin at another
    place each turn, so that it is not always the same ones that --minutes cuts off.
    """
    turn = config.getoption("--turn")
    if turn is None:
        return
    this, of = (int(part) for part in turn.split("/"))
    rooms = (config.getoption("--rooms") or "none").split(",")
    slow = [item for item in items if item.get_closest_marker("slow")]
    place = {item: (crc32(item.nodeid.encode()) - this) % of for item in slow}
    kept = [item for item in slow if place[item] == 0 or _is_of(item.path, rooms)]
    config.hook.pytest_deselected(items=[item for item in slow if item not in kept])
    items[:] = [item for item in items if item not in slow] + sorted(kept, key=place.__getitem__)


def _is_of(file, rooms):
    """Whether `file` tests one of `rooms`: it lies there, or names a room that has no folder of tests."""
    if rooms == ["all"] or file.relative_to(TESTS).parts[0] in rooms:
        return True
    return any(f"fp4rl.{room}" in file.read_text() for room in rooms if not (TESTS / room).is_dir())


def pytest_collection_finish(session):
    """Leave what the imports made out of every later collection of garbage.

    Accelerate collects at each end of a training, and torch, transformers and trl are millions of objects to walk.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()  # at the end of the process all is collected, or extension modules report leaks


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--minutes")
    if minutes is not None and item.get_closest_marker("slow") and monotonic() - BEGAN > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes of slow tests are over; `make slow` runs them all")


@pytest.fixture
def popen():
    """`subprocess.Popen`, whose processes end with the test, however it ends, those of an own session as a group."""
    begun = []

    def begin(*command, start_new_session=False, **options) -> subprocess.Popen:
        process = subprocess.Popen(*command, start_new_session=start_new_session, **options)
        begun.append((process, start_new_session))
        return process

    yield begin
    for process, alone in begun:
        with suppress(ProcessLookupError):
            if alone:
                os.killpg(process.pid, signal.SIGKILL)
            elif process.poll() is None:
                process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
_PROBE = """<script>
addEventListener("error", (event) => { document.body.dataset.error = event.message; });
addEventListener("securitypolicyviolation", (event) => { document.body.dataset.error = event.violatedDirective; });
addEventListener("load", () => {
  const page = document.documentElement;
  document.body.dataset.spill = page.scrollWidth - page.clientWidth;
});
</script></head>"""


@pytest.fixture
def drawn(tmp_path):
    """`drawn(page, width)` opens a page in Chromium: (its body tag, with errors and overflow; the figures drawn)."""
    if _BROWSER is None:
        pytest.skip("no Chromium on this machine")

    def draw(page: str, width: int) -> tuple[str, set[str]]:
        file = tmp_path / "page.html"
        file.write_text(page.replace("</head>", _PROBE, 1), encoding="utf-8")
        own = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--disable-component-update"]
        last = ["--disable-sync", "--virtual-time-budget=5000", "--dump-dom", f"file://{file}"]
        command = [_BROWSER, *_FLAGS.split(), *own, *last]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        body = re.search(r"<body[^>]*>", dom)
        assert body
        return body[0], set(re.findall(r'<div id="([\w-]+)"[^>]*class="[^"]*js-plotly-plot', dom))

    return draw
