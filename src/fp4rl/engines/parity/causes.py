"""Why an engine computes with another policy than the trainer's: how each cause shows, and where it is mended."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Where = Literal["calls", "weights", "versions", "scores", "refresh", "rules", "order"]


@dataclass(frozen=True)
class Cause:
    """One cause: what went wrong, the check that shows it and how, and where it is mended.

    `names`: a pattern that the name of every tensor that differs has; empty where it may be any.
    """

    what: str
    check: Where
    shows: str
    mended: str
    names: str = ""


_EXPERTS = r"experts\b"

CAUSES = (
    Cause(
        "the engine answers without the sites of the injection, or rounds nothing there",
        "calls",
        "a site counts no call, or none of the values that it rounds changes",
        "engines/rollout/kinds.py wraps every layer of vLLM that computes a site (eager: no compiled graph)",
    ),
    Cause(
        "a refresh was missed: the engine holds the weights of an earlier step",
        "weights",
        "almost every matrix differs, in most of its values, from the second step on",
        "whatever calls the engine: the weights are sent before every call (engines/rollout)",
    ),
    Cause(
        "a converter or a sync did nothing, or left out some: matrices, or single experts, stayed in BF16",
        "weights",
        "whole matrices differ, and hold values off the grid of their format",
        "the stream is the only source of weights (rl/stream.py)",
    ),
    Cause(
        "a member of a fused module was left out (q, k or v; gate or up)",
        "weights",
        "one matrix of each group differs, the others are equal",
        "names of the stream are those of the checkpoint, which the engine's own loader fuses",
    ),
    Cause(
        "experts were laid out transposed, or gate and up exchanged",
        "weights",
        "experts differ although names and shapes fit; exchanged: the same values stand under the other name",
        "sites/walk.py decides the layout, and the first product confirms it (inject/experts.py)",
        names=_EXPERTS,
    ),
    Cause(
        "two experts were exchanged: routes lead to another expert than was trained",
        "weights",
        "all matrices of two experts of a layer differ, those of its other experts are equal",
        "an expert keeps its number from the stacked parameter to its name in the stream (rl/stream.py)",
        names=_EXPERTS,
    ),
    Cause(
        "a router was rounded, so that tokens take other routes",
        "weights",
        "the router of a layer differs and holds values on a grid; its experts are equal",
        "injection leaves routers alone (targets), and so does the stream",
        names=r"router|\bgate\.",
    ),
    Cause(
        "the engine's kernel keeps experts in an order of its own, and a refresh did not restore it",
        "weights",
        "all experts of all layers differ from the first refresh on: the same values, in another order",
        "begin_reload lets vLLM, which packs once, pack in every refresh (engines/rollout/mixture.py)",
        names=_EXPERTS,
    ),
    Cause(
        "a rounded copy went stale: it was made of weights that an optimizer has since written",
        "weights",
        "values lie on the grid and are those of the step before",
        "the guards of a rounded copy (docs/decisions/0008)",
    ),
    Cause(
        "a head that is tied to the embedding kept the weight that its kernel packed at first",
        "weights",
        "the embedding alone differs, in rows that training has moved",
        "follow_embeddings packs it again after each refresh (engines/rollout/held.py)",
        names=r"embed|wte|lm_head",
    ),
    Cause(
        "the trainer rounds the FP32 master, the engine its BF16 copy (or the other way round)",
        "weights",
        "about 1 % of the values differ, by one step of the grid",
        "injection.dtype: what is rounded is cast to it on every side",
    ),
    Cause(
        "noise was put on twice, or stayed in the masters",
        "weights",
        "norms alone differ",
        "noise is put on the live weights for the time of a rollout (noise/perturb.py), and the stream reads those",
        names="norm|ln_",
    ),
    Cause(
        "another run feeds the same server, or an update of its weights was lost",
        "versions",
        "answers say another version of the weights than the one that was sent for them",
        "one server a run: rollout.server (each update has a version of its own, engines/rollout/server.py)",
    ),
    Cause(
        "positions, padding or the mask are counted differently while decoding",
        "scores",
        "weights are equal, all tokens score a little apart (98 % over 1e-4 nats) and no point's effect is missing",
        "models/positions.py; one order of the same prompts against another shows it too",
    ),
    Cause(
        "the engine rounds no inputs, or by another rule than was trained (even in place of rceil)",
        "scores",
        "weights are equal, and more than a quarter of the effect of rounding inputs is missing from the scores",
        "injection.deployment names the kernel whose rule is trained; `fp4rl deployments` lists them",
    ),
    Cause(
        "the engine's kernel is another one than that which is deployed",
        "rules",
        "scores agree here, and the deployment's rule alone moves them",
        "train under the deployment that serves: injection.deployment",
    ),
    Cause(
        "one FP32 factor for a whole call (NVFP4, FP8), so that batch-mates decide a token's rounding",
        "order",
        "a prompt alone and among others gives other log-probabilities",
        "factor: per_token or static (mode nvfp4_w4a4 has it)",
    ),
    Cause(
        "a cache is not told of new weights (prefix cache, KV cache of the step before)",
        "refresh",
        "prompts that were answered before score as under the weights of then",
        "engines are made without a prefix cache",
    ),
)


def causes_of(check: str, tensors: Sequence[str] = ()) -> tuple[Cause, ...]:
    """Return the causes that a check can have; `tensors` are the names of those that differ, where they are known."""
    return tuple(
        cause
        for cause in CAUSES
        if cause.check == check and all(re.search(cause.names, name) is not None for name in tensors)
    )
