"""`python vllm_program.py FOLDER`: verl's extension class with the plug-in's in a worker of vLLM, fed by verl's own
bucketed transfer over shared memory; it writes what happened for the test to judge."""

import asyncio
import json
import os
import sys
import threading
from pathlib import Path

import torch

import verl  # noqa: F401
from fp4rl.engines.environment import for_vllm
from fp4rl.engines.rollout.held import require_held
from fp4rl.engines.rollout.kinds import active
from fp4rl.engines.rollout.server import described
from fp4rl.engines.verl.replica import EXTENSION
from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.stream import injected_states, weight_stream
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded

folder = Path(sys.argv[1])
INJECTIONS = {
    "w4a8": Injection.named("w4a8"),
    "w4a4": Injection.named("w4a4"),
    "kv_cache": Injection(mode="w4a8", kv_cache="mxfp8"),
}
os.environ["VERL_RAY_JOB_ID"] = str(os.getpid())  # of the socket's name
for_vllm()


def made():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build(Embedded(), tokenizer)
    for weight in (p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name):
        torch.nn.init.normal_(weight, std=0.06)  # far from the grid, and inputs that matter
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(folder, "float32")


def refresh(llm, worker, stream):
    """Send a stream as verl's trainer does, while the worker takes it as verl's server lets it; buckets of 1 MiB."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    sender = BucketedWeightSender(worker._get_zmq_handle(), bucket_size_mb=1, use_shm=True)
    sending = threading.Thread(target=lambda: asyncio.run(sender.async_send_weights(stream)))
    sending.start()
    llm.collective_rpc("update_weights_from_ipc", kwargs={"use_shm": True})
    sending.join()


def apart(model, prompts, outputs):
    """|log-probability in vLLM - in transformers, in one pass| of every token."""
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        logps = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        found.append(scores.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1) - torch.tensor(logps))
    return torch.cat(found).abs()


model, tokenizer = made()
KEY_AND_VALUE = (2 * model.model.layers[0].self_attn.k_proj.out_features,)  # numbers of a token in the cache
from vllm import LLM, SamplingParams  # noqa: E402

llm = LLM(
    str(folder),
    dtype="float32",
    max_model_len=64,
    enforce_eager=True,
    enable_prefix_caching=False,
    logprobs_mode="processed_logprobs",
    worker_extension_cls=EXTENSION,
)
worker = llm.llm_engine.model_executor.driver_worker.worker
prompts = [tokenizer(f"{a} + {b} = ")["input_ids"] for a in (2, 13, 40) for b in (3, 7, 25, 11)]
settings = [SamplingParams(temperature=1.0, max_tokens=20, logprobs=0, seed=n) for n in range(len(prompts))]


def sampled(rounded):
    """Refresh, sample and count; with the inputs unrounded where not `rounded`, for comparison."""
    refresh(llm, worker, weight_stream(model))
    tensors = require_held(worker.get_model(), weight_stream(model))
    states = active(injected_states(model))
    if rounded:
        assert llm.collective_rpc("fp4rl_begin", args=described(states)) == [[]]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
    [counted] = llm.collective_rpc("fp4rl_end")
    rows = {state.plan.name: (row, state.plan.site.shape) for state, row in zip(states, counted, strict=False)}
    return {
        "tensors": tensors,
        "apart": apart(model, prompts, outputs).tolist(),
        "answered": sum(len(each.outputs[0].token_ids) for each in outputs),
        "computed": sum(len(p) + len(o.outputs[0].token_ids) - 1 for p, o in zip(prompts, outputs, strict=True)),
        "calls": sorted({row["calls"] for row, _ in rows.values()}),
        "tokens": {
            n: {p: m[1] / (s or KEY_AND_VALUE)[-1] for p, m in r["meters"].items()} for n, (r, s) in rows.items()
        },
    }


found = {}
for name, injection in INJECTIONS.items():
    with attach(model, injection) as attachment:
        attachment.set_phase("rollout")
        found[name] = sampled(rounded=True)
        if name == "w4a8":
            found["unrounded"] = sampled(rounded=False)
    for weight in model.parameters():  # another set of weights, as after a step
        weight.data.mul_(1.25)
(folder / "found.json").write_text(json.dumps(found))
