"""Run by test_sharding.py, under torchrun or alone: trains experiments on one fixed batch, each process on its share.

    python replayed.py OUT CACHE SPEC [SPEC ...]

Later answers are longer: a loss that divided by a process's own counts would have another gradient. Writes the
gradients of the first update and what was found, and ends at once, since tearing down a process group may abort.
A fault is planted in the last process where a spec's name ends with `__` and the name of the fault; with one of
`SAMPLED` the answers are those that were sampled. An error that one process alone finds ends the program.
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

from fp4rl.noise.perturb import perturb
from fp4rl.rl import fill, mismatch, processes, session, trainer
from fp4rl.rl.events import StepDone
from fp4rl.rl.train import train
from fp4rl.spec.errors import CheckFailed, NotFinite
from fp4rl.spec.evidence import RolledBack
from fp4rl.spec.load import load_spec
from fp4rl.spec.noise import Noise

ALONE = ("stale_copy", "noise_twice")  # one process finds them, and the launcher ends the others
SAMPLED = ("needs_more", "not_a_number", "not_judged", *ALONE)
fixed_batch, decoded = trainer.training_batch, mismatch.require_decoded


def fixed(answers, stand_in, recipe, rows, pad_id, device):
    if present["fault"] in SAMPLED:
        return fixed_batch(answers, stand_in, recipe, rows, pad_id, device)
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
mismatch.require_decoded = lambda *a: decoded(*a) if present["fault"] in SAMPLED else None  # else nobody sampled it
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


def planted(fault):
    """Whether a fault is to be planted in this process."""
    return present["fault"] == fault and processes.rank() == processes.count() - 1


def spread(self, part):
    """In the last process no group has spread before the third generation of a step, elsewhere all have."""
    present["generations"] += 1
    return torch.full_like(has_spread(self, part), not planted("needs_more") or present["generations"] > 2)


def filled(self, sample):
    present["generations"], present["fills"] = 0, present["fills"] + 1
    if planted("not_a_number") and present["fills"] == 2:
        raise NotFinite("logits hold NaN or infinity")
    return fill_batch(self, sample)


def rolled_out(sampler, model, *given):
    made = roll_out(sampler, model, *given)
    if planted("stale_copy"):  # a weight is written in a way that no guard of its rounded copy sees
        layer = model.get_submodule("model.layers.1.mlp.down_proj")
        layer.weight.data.view(-1)[1] *= 4  # not in the sample that copies are compared with
        made = roll_out(sampler, model, *given)
    if planted("noise_twice"):
        with perturb(model, Noise(), 0.05, generator=torch.Generator().manual_seed(0)):
            made = roll_out(sampler, model, *given)
    return made


def evaluated(self, folder, step, *, last=False):
    """In the first process the first evaluation on the way finds NaN."""
    if present["fault"] == "not_judged" and processes.is_first() and step == 1 and not present["done"]:
        present["done"] = True
        raise NotFinite("after step 1: logits hold NaN or infinity")
    yield from judged(self, folder, step, last=last)


def attached(model, injection):
    last = processes.rank() == processes.count() - 1
    if planted("other_dtype"):
        injection = injection.model_copy(update={"dtype": "float32"})
    made = attach(model, injection)
    if present["fault"] != "no_injection" or not last:
        return made
    made.remove()
    return None


has_spread, fill_batch, roll_out, judged = (
    fill.Filler._spread,
    fill.Filler.fill,
    trainer.roll_out,
    session.Run.judged,
)
fill.Filler._spread, fill.Filler.fill, trainer.roll_out, session.Run.judged = spread, filled, rolled_out, evaluated
trainer.Trainer._clip_grad_norm = keeping_the_first
session.TrainingSession.on_begin = beginning
session.attach = attached


def main(out, cache, *specs):
    torch.set_num_threads(1)
    found = {}
    for spec in specs:
        steps, back = [], []
        present.update(file=out / f"{spec.stem}.grads.safetensors", kept=False, fault=spec.stem.partition("__")[2])
        present.update(generations=0, fills=0, done=False)
        told = {"steps": steps, "back": back, "error": None, "trace": None}

        def hear(event, steps=steps, back=back):
            match event:
                case StepDone(step, metrics):
                    steps.append({"step": step, **metrics})
                case RolledBack():
                    back.append([event.step, event.to])

        try:
            done = train(load_spec(str(spec)), out / spec.stem, cache, hear)
            told["evidence"], told["stopped"] = done.evidence.as_json(), done.stopped
        except CheckFailed as error:
            told["error"] = str(error)
            if present["fault"] in ALONE:
                sys.stderr.write(f"process {processes.rank()}: {error}\n")
                sys.stderr.flush()
                os._exit(3)
        except Exception as error:
            told["error"], told["trace"] = f"{type(error).__name__}: {error}", traceback.format_exc()
        found[spec.stem] = told
    if processes.is_first():
        (out / "found.json").write_text(json.dumps(found))
    processes.wait()
    os._exit(0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
