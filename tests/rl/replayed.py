"""Run by test_sharding.py, under torchrun or alone: trains experiments on one fixed batch, each process on its share.

    python replayed.py OUT CACHE SPEC [SPEC ...]

Later answers are longer: a loss that divided by a process's own counts would have another gradient. Writes the
gradients of the first update and what was found, and ends at once, since tearing down a process group may abort.
A fault is planted in the last process where a spec's name ends with `__` and the name of the fault.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

from fp4rl.rl import mismatch, processes, session, trainer
from fp4rl.rl.events import StepDone
from fp4rl.rl.train import train
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.load import load_spec


def fixed(answers, stand_in, recipe, rows, pad_id, device):
    of_all = rows * processes.count()
    chance = torch.Generator().manual_seed(0)
    lengths = torch.arange(of_all) % 16 + 1 + torch.arange(of_all) // 4
    mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)).long()
    batch = {
        "completion_ids": torch.randint(5, 40, mask.shape, generator=chance),
        "prompt_ids": torch.randint(5, 40, (of_all, 6), generator=chance),
        "prompt_mask": torch.ones(of_all, 6, dtype=torch.long),
        "completion_mask": mask,
        "sampling_per_token_logps": torch.zeros(mask.shape),
        "advantages": torch.randn(of_all, generator=chance),
    }
    first = processes.rank() * rows
    return {name: value[first : first + rows] for name, value in batch.items()}


trainer.training_batch = fixed
mismatch.require_decoded = lambda *_: None  # nobody sampled this batch
clipped, begun, attach = trainer.Trainer._clip_grad_norm, session.TrainingSession.on_begin, session.attach
present = {"file": None, "fault": ""}


def keeping_the_first(self, model):
    file = present["file"]
    if not file.exists() and present["kept"] is False:
        present["kept"] = True
        held = {n: p for n, p in self.model.named_parameters() if p.grad is not None}
        if self.masters is not None:
            held = {name: master for name, (_, master) in self.masters._pairs.items()}
        grads = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in held.items()}
        if processes.is_first():
            save_file({name: grad.float().contiguous() for name, grad in grads.items()}, file)
    return clipped(self, model)


class OwnChunk:
    """Reduces as the others must, and keeps its own gradient alone."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):  # noqa: ARG002
        work = dist.reduce_scatter_tensor(output_tensor, input_tensor, group=group, op=op, async_op=False)
        output_tensor.copy_(input_tensor.chunk(dist.get_world_size())[dist.get_rank()])
        return work

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)


def own_bucket(_state, bucket):
    own = bucket.buffer().clone()
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda _: own)


def shared_bucket(_state, bucket):
    count = dist.get_world_size()
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0] / count)


def beginning(self, made):
    last = processes.rank() == processes.count() - 1
    if present["fault"] == "own_gradients":
        if isinstance(self.model, FSDPModule):
            for part in [m for m in self.model.modules() if isinstance(m, FSDPModule)] if last else []:
                part.set_custom_reduce_scatter(OwnChunk())
        else:
            made.model_wrapped.register_comm_hook(None, own_bucket if last else shared_bucket)
    begun(self, made)
    if present["fault"] == "other_weights" and last:
        with torch.no_grad():
            next(self.model.parameters()).view(-1)[-1] += 1e-3


def attached(model, injection):
    last = processes.rank() == processes.count() - 1
    made = attach(model, injection)
    if present["fault"] != "no_injection" or not last:
        return made
    made.remove()
    return None


trainer.Trainer._clip_grad_norm = keeping_the_first
session.TrainingSession.on_begin = beginning
session.attach = attached


def main(out, cache, *specs):
    torch.set_num_threads(1)
    found = {}
    for spec in specs:
        steps = []
        present.update(file=out / f"{spec.stem}.grads.safetensors", kept=False, fault=spec.stem.partition("__")[2])
        told = {"steps": steps, "error": None, "trace": None}
        try:
            done = train(
                load_spec(str(spec)),
                out / spec.stem,
                cache,
                lambda event, steps=steps: steps.append(event.metrics) if isinstance(event, StepDone) else None,
            )
            told["evidence"] = done.evidence.as_json()
        except CheckFailed as error:
            told["error"] = str(error)
        except Exception as error:
            told["error"], told["trace"] = f"{type(error).__name__}: {error}", traceback.format_exc()
        found[spec.stem] = told
    if processes.is_first():
        (out / "found.json").write_text(json.dumps(found))
    processes.wait()
    os._exit(0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
