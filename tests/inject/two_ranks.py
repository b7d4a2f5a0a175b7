"""Run by test_sharded.py: two gloo ranks train under injection; prints how far they end from one process, as JSON.

    python two_ranks.py CASE [CASE ...]

A case is `mechanism/feature/injection`. Weights and activations are float64, so that sums in another order cannot carry
a value across a rounding threshold; the quantizer sees float32.
"""

import json
import os
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fp4rl.inject.attach import attach
from fp4rl.spec.injection import Injection

STEPS = 3
INJECTIONS = {
    "w4a16": {"mode": "w4a16"},
    "w4a4": {"mode": "w4a4"},
    "w4a4_2d": {"weight": "mxfp4_2d", "input": "mxfp4"},
    "nvfp4": {"mode": "nvfp4_w4a16"},  # the scale of an NVFP4 input spans the batch, so it cannot equal one process
    "packed": {
        "mode": "w4a4",
        "frozen_base": "packed",
        "apply_during": {"weight": ["rollout", "training", "evaluation", "reference"]},
        "targets": {"take": ["*_proj"]},
    },
    "clipped": {"mode": "w4a4", "straight_through": "clipped"},
    "nothing": {"mode": "none"},
}


class Block(nn.Module):
    """Norm, two linears with a bias, a residual; recomputed in the backward when asked."""

    def __init__(self, recompute, gated=False):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(96, 64)
        self.gate_proj = nn.Linear(64, 96) if gated else None
        if gated:  # its factor is that of both
            self.gate_proj.weight.data[0, 0] = 1.0
        self.recompute = recompute

    def compute(self, x):
        x_in = self.norm(x)
        gate = 1.0 if self.gate_proj is None else self.gate_proj(x_in)
        return x + self.down_proj(nn.functional.silu(self.up_proj(x_in)) * gate)

    def forward(self, x):
        return checkpoint(self.compute, x, use_reentrant=False) if self.recompute else self.compute(x)


def build(feature):
    torch.manual_seed(0)
    blocks = [Block("checkpoint" in feature, "gated" in feature) for _ in range(2)]
    model = nn.Sequential(*blocks, nn.Linear(64, 10)).double()
    if "lora" in feature:
        from peft import LoraConfig, get_peft_model  # slow to import, and most cases do without

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["up_proj", "down_proj"]))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
    return model


def data():
    generator = torch.Generator().manual_seed(2)
    draw = torch.randn(STEPS, 8, 5, 64, generator=generator, dtype=torch.float64)
    return draw, torch.randn(STEPS, 8, 5, 10, generator=generator, dtype=torch.float64)


def injection_of(feature, name):
    lora = {"lora": "merged"} if "merged" in feature else {}
    return Injection.model_validate({**INJECTIONS[name], **lora, "dtype": "float32", "fused_groups": "free"})


def wrap(model, mechanism):
    if mechanism.startswith("fsdp2"):
        stack = model.base_model.model if hasattr(model, "base_model") else model
        for block in list(stack)[:2]:
            for layer in (block.up_proj, block.gate_proj) if "each" in mechanism else ():
                fully_shard(layer)
            fully_shard(block)
        return fully_shard(model)
    if mechanism.startswith("fsdp1"):
        policy = ModuleWrapPolicy({Block})
        original = "flat" not in mechanism
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
        )
    return DistributedDataParallel(model)


def train(model, outer, injection, accumulate, rows, late):
    """-> (first outputs, whole parameters after the steps); attaches after wrapping when `late`."""
    harmed = None if late else attach(model, injection)
    outer = outer()
    harmed = attach(model, injection) if late else harmed
    optimizer = torch.optim.SGD([p for p in outer.parameters() if p.requires_grad], 0.05)
    xs, targets = data()
    outputs = []
    for x, target in zip(xs[:, rows], targets[:, rows], strict=True):
        harmed.set_phase("rollout")
        with torch.no_grad():
            outputs.append(outer(x))
        harmed.set_phase("training")
        for i, (micro, wanted) in enumerate(zip(x.chunk(accumulate), target.chunk(accumulate), strict=True)):
            last = i == accumulate - 1
            quiet = outer.no_sync() if hasattr(outer, "no_sync") and not last else nullcontext()
            with quiet:
                ((outer(micro) - wanted).square().mean() / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    harmed.require_calls()
    return torch.stack(outputs), outer


def whole(outer):
    if isinstance(outer, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(outer):
            named = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in outer.named_parameters()]
            return {name: p.detach().clone() for name, p in named}
    options = StateDictOptions(full_state_dict=True)
    return {n.removeprefix("module."): p for n, p in get_model_state_dict(outer, options=options).items()}


def far(a, b):
    return float((a - b).norm() / b.norm())


def run(case):
    mechanism, feature, name = case.split("/")
    injection, accumulate = injection_of(feature, name), 2 if "accumulate" in feature else 1
    alone = build(feature)
    unpacked = injection.model_copy(update={"frozen_base": "copy"})
    expected, _ = train(alone, lambda: alone, unpacked, accumulate, slice(None), late=False)
    rank = dist.get_rank()
    rows = slice(4 * rank, 4 * rank + 4)
    model = build(feature)
    outputs, outer = train(
        model, lambda: wrap(model, mechanism), injection, accumulate, rows, late=mechanism.endswith("late")
    )
    after, reference = whole(outer), dict(alone.named_parameters())
    start = dict(build(feature).named_parameters())
    trained = [n for n, p in reference.items() if p.requires_grad]
    plain = build(feature)
    train(plain, lambda: plain, Injection(), accumulate, slice(None), late=False)
    unharmed = dict(plain.named_parameters())
    return {
        "outputs": far(outputs, expected[:, rows]),
        "weights": max(far(after[n] - start[n], reference[n] - start[n]) for n in trained),
        "power": min(far(unharmed[n] - start[n], reference[n] - start[n]) for n in trained if "weight" in n),
    }


def main(rank, cases, store, report):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for case in cases:
        try:
            found[case] = run(case)
        except Exception as error:
            found[case] = {"error": f"{type(error).__name__}: {error}"}
    gathered = [None, None]
    dist.all_gather_object(gathered, found)
    if rank == 0:
        Path(report).write_text(json.dumps(gathered))
    dist.destroy_process_group()
    # A thread of gloo that is still winding down would abort the interpreter's own shutdown, now and then.
    os._exit(0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        paths = f"{folder}/store", f"{folder}/report"
        torch.multiprocessing.spawn(main, (sys.argv[1:], *paths), nprocs=2)
        sys.stdout.write(Path(paths[1]).read_text())
