"""A worker of a vLLM server in which faults can be planted, one at a time."""

from contextlib import contextmanager
from dataclasses import replace

from safetensors.torch import load_file

from fp4rl.engines.rollout import kinds
from fp4rl.engines.rollout.linear import Rounded
from fp4rl.engines.rollout.worker import FromFiles, Worker

LAST = {}
WHOLE = Rounded.apply, FromFiles.receive_weights, kinds.KINDS


def unrounded(self, layer, x, bias=None):
    """Count as if inputs had been rounded, and compute with the unrounded ones."""
    for member in self.members:
        member.count()
        if member.input_on:
            member.note("input", x, x, x.numel())
    return self.method.apply(layer, x, bias)


def uncounted(self, layer, x, bias=None):
    """Neither round nor count."""
    return self.method.apply(layer, x, bias)


@contextmanager
def keys_alone(layer, members):
    """Round keys and store values as they are, counted as if both were rounded."""
    (state,) = members
    compute = layer.forward

    def forward(query, key, value):
        state.count()
        rounded, _ = (state.stored(x.view(-1, layer.num_kv_heads, layer.head_size)) for x in (key, value))
        return compute(query, rounded, value)

    layer.forward = forward
    yield
    del layer.forward


@contextmanager
def unstored(*_):
    """Neither round what is stored nor count."""
    yield


def missed(self, update_info):
    """Keep the weights of the update before, however many come: a refresh that is missed."""
    self.model.load_weights(iter(LAST.items()))


def remembered(self, update_info):
    """Load as usual and keep what was loaded."""
    LAST.update(load_file(update_info.path))
    WHOLE[1](self, update_info)


def left_out(self, update_info):
    """Load all but one member of a fused layer, which keeps what lay there."""
    part = load_file(update_info.path)
    lost = "model.layers.0.self_attn.k_proj.weight"
    kept = {name: LAST[name] if name == lost else tensor for name, tensor in part.items()}
    self.model.load_weights(iter(kept.items()))


class Planted(Worker):
    """Worker with `fp4rl_plant`."""

    fp4rl_blind = False

    def fp4rl_plant(self, fault: str) -> None:
        """Plant `fault`; `none` takes it away."""
        Rounded.apply, FromFiles.receive_weights, kinds.KINDS = WHOLE[0], remembered, WHOLE[2]
        if fault in ("unrounded", "uncounted"):
            Rounded.apply = {"unrounded": unrounded, "uncounted": uncounted}[fault]
        if fault in ("keys_alone", "unstored"):
            own = replace(WHOLE[2]["attention"], rounding={"keys_alone": keys_alone, "unstored": unstored}[fault])
            kinds.KINDS = {**WHOLE[2], "attention": own}
        for layer in self.model_runner.get_model().model.layers[1:]:
            layer.self_attn.attn.kv_sharing_target_layer_name = "layers.0" if fault == "shared" else None
        if fault in ("missed", "left_out"):
            FromFiles.receive_weights = {"missed": missed, "left_out": left_out}[fault]
        self.fp4rl_blind = fault == "uncompared"

    def fp4rl_compare(self, path, names, first):
        """Compare nothing where that is planted."""
        return [] if self.fp4rl_blind else super().fp4rl_compare(path, names, first)


FromFiles.receive_weights = remembered
