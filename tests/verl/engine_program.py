"""Two ranks of verl's FSDP2 engine, without ray: trains, streams, and writes what it found for the test to judge."""

import json
import os
import sys
from pathlib import Path

import torch

folder, kind = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])

from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils.distributed import initialize_global_process_group  # noqa: E402
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig  # noqa: E402
from verl.workers.engine import EngineRegistry  # noqa: E402

import verl  # noqa: E402, F401
from fp4rl.engines.verl.engine import Engine  # noqa: E402
from fp4rl.engines.verl.settings import experiment  # noqa: E402

initialize_global_process_group()
Engine.experiment = experiment()


LORA = {"lora_rank": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora": {"merge": True}}


def engine(frozen=False, **more):
    lora = LORA if kind == "lora" else {}
    made = EngineRegistry.new(
        "language_model",
        "fsdp2",
        model_config=HFModelConfig(
            path=str(folder / "model"),
            override_config={"attn_implementation": "sdpa"},
            use_remove_padding=False,
            enable_gradient_checkpointing=True,
            **lora,
        ),
        engine_config=FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False, forward_only=frozen, **more),
        optimizer_config=None if frozen else FSDPOptimizerConfig(lr=1e-2, total_training_steps=4, lr_warmup_steps=0),
        checkpoint_config=CheckpointConfig(),
    )
    made.initialize()
    return made


def whole(made):
    """The masters, gathered by torch alone, in bfloat16."""
    return {n: p.detach().full_tensor().bfloat16().clone() for n, p in made.module.named_parameters()}


def streamed(made):
    stream, adapter = made.get_per_tensor_param(base_sync_done=True)
    assert adapter is None
    return {name: value.clone() for name, value in stream}


made, found = engine(param_offload=kind == "offload"), []
for step in range(3):
    before = whole(made)
    sent = streamed(made)
    after = whole(made)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    report = made.policy.report(trained=step > 0, last=step == 2)
    if rank == 0:
        torch.save({"masters": before, "sent": sent}, folder / f"{kind}-{step}.pt")
    found.append(
        {
            "unchanged": unchanged,
            "sites": len(report.sites.plans),
            "trainable": report.trainable,
            "counts": dict(report.counts),
            "compared": report.streamed.compared,
            "sigma": report.streamed.sigma,
            "adapted": [plan.site for plan in report.sites.plans if "lora" in plan.site],
        }
    )
    torch.manual_seed(rank)
    with made.train_mode():
        made.module(input_ids=torch.randint(0, 256, (2, 16))).logits.float().logsumexp(-1).mean().backward()
        made.optimizer_step()
        made.lr_scheduler_step()
if kind == "full":
    sent = streamed(made)
    parts = [(name, part.clone(), spec) for name, part, spec in made.get_per_tensor_param_shard()[0]]
    gathered: list = [None, None]
    torch.distributed.all_gather_object(gathered, [(name, part) for name, part, _ in parts])
    joined = {name: torch.cat([one, other]) for (name, one), (_, other) in zip(*gathered, strict=True)}
    shards = joined.keys() == sent.keys() and all(torch.equal(joined[n], sent[n].flatten()) for n in sent)
    made.prime_delta_snapshots()
    deltas = sum(len(values) for entry in made.get_per_tensor_param_delta_shard()[0] for values in [entry[4]])
    reference = engine(frozen=True)
    with torch.no_grad():
        reference.module(input_ids=torch.arange(16)[None])
    found.append(
        {
            "shards": shards,
            "deltas": deltas,
            "reference": reference.policy.attachment.phase,
            "rounded in the reference": dict(reference.policy._counts()),
        }
    )
    # A checkpoint goes on at its own step of the schedule.
    made.save_checkpoint(str(folder / "checkpoint"), global_step=3)
    again = engine()
    again.load_checkpoint(str(folder / "checkpoint"), del_local_after_load=False)
    resumed = streamed(again)
    found[-1]["resumed"] = again.policy.streamed.step, all(torch.equal(value, sent[n]) for n, value in resumed.items())
    # A stream that is left half read gives the masters back too.
    before, stream = whole(made), made.get_per_tensor_param()[0]
    next(stream)
    stream.close()
    found[-1]["half read"] = all(torch.equal(value, before[name]) for name, value in whole(made).items())
if kind == "lora":
    with made.disable_adapter():
        found.append({"without adapters": made.policy.attachment.phase})
    found[-1]["with them"] = made.policy.attachment.phase
if rank == 0:
    (folder / f"{kind}.json").write_text(json.dumps(found))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
