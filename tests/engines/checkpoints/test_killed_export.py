"""An export that is killed at any moment leaves its folder whole or not there, and the next one clears up."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.engines.checkpoints.verify.files import files, read_record
from fp4rl.models.tokenizer import build_tokenizer

# The first export imports everything; each line on stdin forks another, so that a kill meets its work.
PROGRAM = """
import os, sys
from fp4rl.cli.main import main
from fp4rl.engines.checkpoints.layouts.baked import Baked
Baked.file_bytes = 4_000_000
main(["export", *sys.argv[1:]])
for line in sys.stdin:
    child = os.fork()
    if not child:
        code = main(["export", *line.split()])
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """24 MB of weights, in tensors small enough that every kind of moment is met."""
    place, tokenizer = tmp_path_factory.mktemp("killed") / "model", build_tokenizer()
    sizes = {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4}
    ids = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("qwen2", **sizes, **ids, intermediate_size=1024, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


class Exports:
    """Exports of a model to the folder `out` beside it, each a process of its own; `said` has their errors."""

    def __init__(self, model):
        self.model, self.place, self.out = model, model.parent, model.parent / "out"
        self.said = self.place / "said"
        with self.said.open("w") as said:
            self.server = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", PROGRAM, *self.words(self.place / "warm")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        began = self.begin() and time.monotonic()
        assert self.code() == 0
        self.takes = time.monotonic() - began
        self.out.rename(self.place / "first")
        self.said.write_text("")

    def words(self, out):
        return [str(self.model), str(out), "--to", "bf16", "--mode", "w4a16"]

    def begin(self):
        """Begin an export; its process."""
        self.server.stdin.write(" ".join(self.words(self.out)) + "\n")
        self.server.stdin.flush()
        return self._number()

    def code(self):
        """The exit code of the export that was begun, when it has ended."""
        return self._number()

    def stopped(self, signal_, after):
        """The exit code of an export that gets a signal at a part of the time that it takes."""
        process = self.begin()
        time.sleep(self.takes * after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal_)
        return self.code()

    def _number(self):
        for line in self.server.stdout:
            if line.strip().lstrip("-").isdigit():  # all else is what the verb prints
                return int(line)
        pytest.fail(self.said.read_text())


@pytest.fixture(scope="module")
def exports(model):
    made = Exports(model)
    yield made
    made.server.communicate(timeout=60)


def whole(out):
    check = files(out, read_record(out))
    return check.differences == [] and check.compared["files"] >= 8


def test_ten_kills_at_random_moments_leave_no_half_written_folder(exports):
    out, moments, killed = exports.out, random.Random(0), 0
    for number in range(10):
        killed += exports.stopped(signal.SIGKILL, 0.8 * (number + moments.random()) / 10) == -signal.SIGKILL
        if out.exists():
            assert whole(out)
            out.rename(exports.place / f"out{number}")
    assert killed >= 5, "the exports were over before they were killed"
    assert len(list(exports.place.glob(".out.*.partial"))) <= 1  # each removes what the one before left behind
    exports.begin()
    assert exports.code() == 0
    assert whole(out)
    assert list(exports.place.glob(".*")) == []
    out.rename(exports.place / "last")


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGINT, 130, "fp4rl: stopped\n"), (signal.SIGTERM, 143, "")]
)
def test_an_export_that_is_asked_to_end_leaves_nothing(number, code, line, exports):
    before = sorted(exports.place.iterdir())
    exports.said.write_text("")
    codes = []
    for part in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9):
        if code in codes:
            break
        codes.append(exports.stopped(number, part))
        if exports.out.exists():  # it was over before, and may get the signal while its process ends
            assert whole(exports.out)
            shutil.rmtree(exports.out)
    assert set(codes) <= {0, code, -number}  # before anything was written a signal just ends the process
    assert code in codes
    assert exports.said.read_text().replace("\0", "") == line * codes.count(code)
    assert sorted(exports.place.iterdir()) == before
