"""Two gloo ranks under FSDP2, FSDP1 and DDP train what one process trains, injection included."""

import copy
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import Shard, distribute_tensor

from fp4rl.inject.attach import attach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection

MECHANISMS = ("fsdp2", "fsdp2_late", "fsdp1", "fsdp1_late", "fsdp1_flat", "ddp")
FEATURES = ("plain", "checkpoint", "accumulate", "checkpoint+accumulate", "lora", "lora+checkpoint", "merged+lora")
# Everything under W4A4, and every injection under FSDP2. A flat FSDP1 parameter cannot mix frozen and trained weights.
MATRIX = [
    *(f"{m}/{f}/w4a4" for m, f in product(MECHANISMS, FEATURES) if not (m == "fsdp1_flat" and "lora" in f)),
    *(f"fsdp2/checkpoint+accumulate/{name}" for name in ("w4a16", "w4a4_2d", "nvfp4", "clipped")),
    *(f"{mechanism}/gated/nvfp4" for mechanism in ("fsdp2", "fsdp2each", "fsdp1")),
    "ddp/lora+checkpoint/packed",
]


def on_two_ranks(cases):
    """Case -> the worse of both ranks' distances from one process."""
    script = Path(__file__).with_name("two_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *cases], capture_output=True, text=True, env=environment, timeout=540, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def require_equal(ranks, case):
    for rank in ranks:
        found = rank[case]
        assert "error" not in found, found
        assert found["outputs"] < 1e-6
        assert found["weights"] < 1e-6
        assert found["power"] > 1e-3  # without the injection the same training ends elsewhere


REFUSED = {
    "fsdp2/lora/packed": "FSDP cannot shard packed weights",
    "fsdp1_flat_late/plain/w4a4": "sharded already",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(case):
    for rank in on_two_ranks([case]):
        assert REFUSED[case] in rank[case]["error"]


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("order", ["attach first", "shard first"])
def test_sharded_weights_are_rounded_whole_and_no_copy_of_them_is_kept(order):
    model, injection, x = blocks(), Injection.named("w4a16"), torch.randn(4, 64)
    mesh = init_device_mesh("cpu", (1,))  # where there is a GPU, FSDP2 would take it
    with attach(blocks(), injection) as alone:
        expected = alone.model(x)
    harmed = attach(model, injection) if order == "attach first" else None
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    harmed = harmed or attach(model, injection)
    for phase in ("rollout", "training"):
        harmed.set_phase(phase)
        with torch.set_grad_enabled(phase == "training"):
            assert torch.equal(model(x), expected)
    model(x).sum().backward()
    elements = {row.phase: row.elements for row in harmed.evidence() if row.site == "0"}
    assert elements == {"rollout": 64 * 64, "training": 2 * 64 * 64}
    assert all(layer.__dict__["injected"].cache.copy is None for layer in model)
    harmed.remove()
    assert not torch.equal(model(x), expected)


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_tensor_is_not_rounded_in_parts():
    parts = distribute_tensor(torch.randn(64, 64), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(InvalidValueError, match=r"cannot be rounded in parts; gather it: x.full_tensor"):
        fake_quantize(parts, MXFP4)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1"])
def test_mixed_precision_rounds_what_bfloat16_always_rounds(sharding):
    x, half = torch.randn(4, 64), torch.bfloat16
    model = blocks()
    oracle = copy.deepcopy(model).to(half)
    for layer in oracle:
        layer.weight.data = fake_quantize(layer.weight.data, MXFP4)
    expected = oracle(x.to(half)).detach().float()
    with attach(model, Injection.named("w4a16")), torch.no_grad():
        if sharding == "fsdp2":
            mesh = init_device_mesh("cpu", (1,))
            fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=half))
        else:
            how = {"sharding_strategy": ShardingStrategy.NO_SHARD, "device_id": torch.device("cpu")}
            mixed = MixedPrecision(param_dtype=half)
            model = FullyShardedDataParallel(model, mixed_precision=mixed, use_orig_params=True, **how)
        found = model(x).float()
    assert float((found - expected).norm() / expected.norm()) < 2e-2  # Q of the float32 weights lies at 0.09


@pytest.mark.usefixtures("one_rank")
def test_packing_what_is_sharded_is_refused_before_anything_is_touched():
    model = blocks().requires_grad_(False)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    weights = [id(p) for p in model.parameters()]
    always = {"weight": ["rollout", "training", "evaluation", "reference"]}
    packed = Injection.model_validate({"mode": "w4a16", "frozen_base": "packed", "apply_during": always})
    with pytest.raises(InvalidValueError, match="FSDP cannot shard packed weights"):
        attach(model, packed)
    assert [id(p) for p in model.parameters()] == weights
    assert not any("injected" in module.__dict__ for module in model.modules())


@pytest.fixture(scope="module")
def matrix():
    return on_two_ranks(MATRIX)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX)
def test_two_ranks_equal_one_process(matrix, case):
    require_equal(matrix, case)
