"""`python core_program.py FOLDER`: everything but training; it writes what it did. It runs in both environments."""

import importlib
import json
import pkgutil
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import torch

import fp4rl
from fp4rl.cli.main import main
from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.rl.inputs import warmed_up
from fp4rl.rl.stream import weight_stream
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded
from fp4rl.tasks.arithmetic import Arithmetic


def imported():
    """Missing package -> modules of fp4rl that need it."""
    missing = defaultdict(list)
    for module in pkgutil.walk_packages(fp4rl.__path__, "fp4rl."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[error.name.partition(".")[0]].append(module.name)
        except ValueError:  # verl's own word where it finds no vLLM
            if find_spec("vllm") is not None:
                raise
            missing["vllm"].append(module.name)
    return missing


def streamed(folder):
    """The linear weights that a stream under W4A16 gives, and how many of them are the master's own rounding."""
    model, _ = load(folder, "float32")
    masters = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with attach(model, Injection.named("w4a16")) as attachment:
        attachment.set_phase("rollout")
        sites = [f"{plan.name}.weight" for plan in attachment.table.plans]
        sent = {name: value.clone() for name, value in weight_stream(model)}
    equal = [name for name in sites if torch.equal(sent[name], mxfp4(masters[name].bfloat16().float()))]
    return len(sites), len(equal)


def mxfp4(x):
    """OCP's MXFP4 written out: blocks of 32 along a row, a power of two, E2M1, ties to the even code."""
    blocks = x.unflatten(-1, (-1, 32)).double()
    exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))[1] - 3  # floor(log2) - 2
    scaled = torch.ldexp(blocks, -exponent).clamp(-6, 6)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    distance = (scaled.abs().unsqueeze(-1) - grid).abs()
    nearest = distance == distance.amin(-1, keepdim=True)  # two at a tie, and the even of them counts
    even = torch.where(nearest, torch.arange(8) % 2, 2).argmin(-1)
    return torch.ldexp(grid[even].copysign(scaled), exponent).flatten(-2).float()


def verbs(folder, place):
    """Exit code of each verb."""
    commands = {
        "plan": ["plan", "catalogue/quickstart"],
        "keys": ["keys", "training"],
        "formats": ["formats", "mxfp4"],
        "sites": ["sites", str(folder)],
        "eval": ["eval", str(folder), "-p", "full", "-p", "w4a8", "--count", "2"],
        "scan": ["scan", str(folder), "weights_only=true", "--json"],
        "export": [
            "export",
            str(folder),
            str(place / "packed"),
            "--to",
            "compressed_tensors",
            "--mode",
            "w4a16",
            "--anyway",
        ],
        "run": ["run", "catalogue/quickstart", "--runs", str(place / "runs")],
    }
    return {verb: main(command) for verb, command in commands.items()}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    folder = warmed_up(Embedded(warm_up_steps=2), Arithmetic(), place / "models")
    done = {"missing": imported(), "streamed": streamed(folder), "verbs": verbs(folder, place)}
    (place / "done.json").write_text(json.dumps(done))
