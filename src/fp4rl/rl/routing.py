"""The experts that a mixture chooses for each token: recorded in sampling, compared and replayed in training.

Where rollout and training round differently, a token can get other experts in training than those that sampled it.
`Recorder` keeps the numbers that the experts were called with; `RouterWatch` compares training's own choice with them
and, with `training.routing_replay`, uses the rollout's instead (rollout routing replay, arXiv 2510.11370).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fp4rl.sites.walk import plain_name, walk
from fp4rl.spec.errors import CheckFailed, InvalidValueError

NOT_KNOWN = -1  # instead of an expert's number: the router chooses itself
_LORA = re.compile(r"(\.base_layer)+$")  # what an adapter of the experts adds to their path


def mixtures(model: nn.Module) -> dict[str, int]:
    """Return path -> number of experts of the modules of `model` that hold stacked experts, in the model's order."""
    return {site.path: site.shape[0] for site in walk(model) if site.kind == "experts" and len(site.shape) == 3}


def chosen(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the numbers of experts [tokens, k] among the arguments of a module of experts; None without them."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return next((t for t in tensors if t.dim() > 1 and not t.is_floating_point() and t.dtype != torch.bool), None)


class Recorder:
    """Records the experts of each token in each layer, over several forwards."""

    def __init__(self) -> None:
        self._layers: list[list[Tensor]] = []

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record every mixture of the model inside the `with`."""
        with ExitStack() as stack:
            for path in mixtures(model):
                seen: list[Tensor] = []
                self._layers.append(seen)
                stack.callback(_before_experts(model.get_submodule(path), seen.append).remove)
            yield

    def routes(self, rows: int, tokens: int) -> Tensor | None:
        """Return the experts recorded in a generation of `rows` answers of `tokens` tokens each, padding included.

        [rows, tokens, layers, k] in int16; None where a mixture is not called with the numbers of its experts. Raises
        CheckFailed for another number of tokens.
        """
        if not self._layers or not all(self._layers):
            return None
        layers = [torch.cat([part.reshape(rows, -1, part.shape[-1]) for part in seen], dim=1) for seen in self._layers]
        if layers[0].shape[1] != tokens:
            raise CheckFailed(f"experts were chosen for {layers[0].shape[1]} tokens a row, and {tokens} were fed")
        return torch.stack(layers, dim=2).to("cpu", torch.int16)


def _before_experts(experts: nn.Module, take: Callable[[Tensor], None]) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        numbers = chosen(args, kwargs)
        if numbers is not None:
            take(numbers.detach())

    return experts.register_forward_pre_hook(hook, with_kwargs=True)


@dataclass
class _Block:
    """A mixture in training: its router's choice in this forward, and that of the rollout."""

    path: str
    experts: int
    natural: list[Tensor] = field(default_factory=list)  # the numbers of every top-k over the experts, in order
    which: int = -1  # the one among them that the experts are called with
    prescribed: Tensor | None = None  # [tokens, k]
    watched: bool = False
    mode: ExitStack = field(default_factory=ExitStack)


class _Choice(TorchFunctionMode):
    """Intercepts every top-k over the experts inside a block, and replaces the decisive one by a prescribed choice."""

    def __init__(self, block: _Block, replace: bool) -> None:
        super().__init__()
        self._block, self._replace = block, replace

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        scores, block = (*args, *(kwargs or {}).values())[0], self._block
        if scores.shape[-1] != block.experts:
            return result
        block.natural.append(result.indices.detach())
        if not self._replace or block.prescribed is None or block.which != len(block.natural) - 1:
            return result
        given = block.prescribed.reshape(result.indices.shape)
        numbers = torch.where(given == NOT_KNOWN, result.indices, given)
        return torch.return_types.topk((scores.gather(-1, numbers), numbers))


class RouterWatch:
    """Compares training's choice of experts with the rollout's; with `replay` the rollout's is used instead.

    Which top-k of a block its experts are called with is found by value, in one short forward. A model without experts
    has nothing to compare. `unseen`: why the choice of a mixture cannot be followed; None where it can.

    Raises InvalidValueError for `replay` where it cannot.
    """

    def __init__(self, model: nn.Module, *, replay: bool = False) -> None:
        self._replay, self._paused, self._probing = replay, False, True
        self._blocks = [_Block(path, experts) for path, experts in mixtures(model).items()]
        self._counts: list[Tensor] = []  # [3]: places known, chosen otherwise, and replayed wrongly
        self._hooks = [hook for block in self._blocks for hook in self._install(model, block)]
        with torch.no_grad():
            if self._blocks:
                model(input_ids=torch.ones(1, 8, dtype=torch.long, device=next(model.parameters()).device))
        self._probing = False
        self.unseen = next((_unseen(model, block) for block in self._blocks if block.which < 0), None)
        if self.unseen is not None:
            self.remove()
            if replay:
                raise InvalidValueError(f"{self.unseen}: leave training.routing_replay off")

    def remove(self) -> None:
        """Remove all hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        self._blocks.clear()

    def following(self, batch: Mapping[str, Tensor]) -> Callable[[slice], None]:
        """Return a function to be called before the forward of some rows of a training batch."""
        whole = whole_routes(batch) if self._blocks else None
        return lambda rows: self.prescribe(None if whole is None else whole[rows])

    def prescribe(self, routes: Tensor | None) -> None:
        """Set the rollout's choice for the rows of the next forward, [rows, tokens, layers, k]; None: unknown."""
        for layer, block in enumerate(() if self._paused else self._blocks):
            block.prescribed = None if routes is None else routes[:, :, layer].flatten(0, 1).long()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave forwards inside the `with` alone, also of the same model; what was prescribed is kept for later."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def load(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Return how evenly the tokens of a training batch, prompts included, are spread over the experts.

        - `router/load_max`: tokens of the busiest expert over an even share, mean over layers; 1 is balanced.
        - `router/load_entropy`: entropy of the load over that of an even one, mean over layers; 1 is balanced.
        - `router/unused_share`: share of the experts without any token.
        """
        whole = whole_routes(batch)
        if whole is None or not self._blocks:
            return {}
        experts = max(block.experts for block in self._blocks)
        met = [layer[layer != NOT_KNOWN].long() for layer in whole[batch["completion_mask"].any(-1)].unbind(2)]
        counts = torch.stack([torch.bincount(layer, minlength=experts) for layer in met]).float()  # [layers, experts]
        load = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        return {
            "router/load_max": (load.amax(-1) * experts).mean().item(),
            "router/load_entropy": torch.special.entr(load).sum(-1).mean().item() / math.log(experts),
            "router/unused_share": (counts == 0).float().mean().item(),
        }

    def take(self) -> dict[str, float]:
        """Return `router/flip_share` of the forwards since the last call: the share of tokens and layers in which
        training's own choice is another set of experts than the rollout's.

        Raises CheckFailed where a replay did not reach the experts.
        """
        if not self._counts:
            return {}
        known, flipped, wrong = torch.stack(self._counts).sum(0).tolist()
        self._counts.clear()
        if self._replay and (wrong or not known):
            raise CheckFailed(f"routing replay: the experts of {wrong} of {known} places are not those of the rollout")
        return {"router/flip_share": flipped / known} if known else {}

    def _install(self, model: nn.Module, block: _Block) -> Iterator[RemovableHandle]:
        around = model.get_submodule(_LORA.sub("", block.path).rpartition(".")[0])
        yield around.register_forward_pre_hook(lambda *_: self._enter(block))
        yield around.register_forward_hook(lambda *_: block.mode.close(), always_call=True)
        yield _before_experts(model.get_submodule(block.path), lambda numbers: self._handed(block, numbers))

    def _enter(self, block: _Block) -> None:
        block.natural.clear()
        block.watched = self._probing or (block.prescribed is not None and not self._paused)
        if block.watched:
            block.mode.enter_context(_Choice(block, self._replay))

    def _handed(self, block: _Block, numbers: Tensor) -> None:
        if self._probing:
            same = [n for n, own in enumerate(block.natural) if torch.equal(own.flatten(), numbers.flatten())]
            block.which = same[-1] if same else -1
        elif block.watched and block.prescribed is not None:
            known = (block.prescribed != NOT_KNOWN).all(-1)
            wrong = (numbers.reshape(block.prescribed.shape) != block.prescribed).any(-1)
            own = block.natural[block.which].reshape(block.prescribed.shape)
            flipped = (own.sort(-1).values != block.prescribed.sort(-1).values).any(-1)
            self._counts.append(torch.stack([known.sum(), (flipped & known).sum(), (wrong & known).sum()]))


def _unseen(model: nn.Module, block: _Block) -> str:
    kind = type(model.get_submodule(block.path)).__name__.removeprefix("Injected")
    where = f"{plain_name(block.path)} ({kind})"
    return f"{where} is not handed the numbers of its experts as a top-k of the block above gives them"


def whole_routes(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return the experts of prompts and answers, concatenated, [rows, P + T, layers, k]; None where unknown."""
    if "prompt_routes" not in batch:
        return None
    return torch.cat([batch["prompt_routes"], batch["completion_routes"]], dim=1)


def padded_routes(routes: Sequence[Tensor], prompts: Sequence[int], widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pad the experts of answers to the shape of a batch: [rows, P, layers, k] and [rows, T, layers, k].

    `routes`: [tokens, layers, k] of each answer, with its prompt (of `prompts` tokens). NOT_KNOWN in the padding.
    """
    shape = routes[0].shape[1:]
    before, after = (routes[0].new_full((len(routes), width, *shape), NOT_KNOWN) for width in widths)
    for row, (own, prompt) in enumerate(zip(routes, prompts, strict=True)):
        before[row, widths[0] - prompt :] = own[:prompt]
        after[row, : len(own) - prompt] = own[prompt:]
    return before, after
