"""What injection costs in a mixture of experts: a training step and generation, for each way to compute the experts.

    python benchmarks/experts.py [--rounds 20] [--write]

A plain Qwen3-MoE and its injected twins take turns, as in `injection.py`. `batched_mm`, which gives every row a matrix
of its own, has a quarter of the rounds. `--write` puts the table into benchmarks/results/experts.md.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from injection import TRAINING, Arm, in_turn, measure

MODES = ("w4a16", "w4a8", "w4a4")
AIMS = {("training", "w4a4"): 1.60}
COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
COMMON |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
# `tiny` is the mixture that the tests of `run` train; in `wide` few tokens meet many weights that a step has changed.
SIZES = {
    "tiny": {
        "hidden_size": 64,
        "head_dim": 16,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "wide": {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 16},
}
SIZES["wide"]["num_experts_per_tok"] = 4
FEW = torch.randint(5, 45, (8, 64), generator=torch.Generator().manual_seed(1))
TOKENS = {"tiny": TRAINING, "wide": FEW}
ROWS = (
    *(("tiny", deed, way) for deed in ("training", "generation") for way in ("grouped_mm", "eager", "batched_mm")),
    *(("wide", "training", way) for way in ("grouped_mm", "eager")),
)
RESULTS = Path(__file__).parent / "results" / "experts.md"


def arm_of(size: str, way: str, mode: str | None) -> Arm:
    """Return a mixture with random weights, its optimizer and its tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **COMMON | SIZES[size]))
    model.set_experts_implementation(way)
    return Arm(model, mode, TOKENS[size])


def row(size: str, deed: str, way: str, rounds: int) -> str:
    """Measure one way to compute the experts, all arms in turn."""
    arms = {mode: arm_of(size, way, mode) for mode in (None, *MODES)}
    return f"| {size} | {deed} | `{way}` | {in_turn(arms, deed, rounds, AIMS)} |"


def table(rounds: int) -> Iterator[str]:
    """Yield the table, a row for each size, deed and way."""
    yield "| model | | experts | plain | " + " | ".join(MODES) + " |"
    yield "|---" * (len(MODES) + 4) + "|"
    for size, deed, way in ROWS:
        yield row(size, deed, way, max(2, rounds // 4) if way == "batched_mm" else rounds)


HEAD = (
    "# What injection costs in a mixture of experts",
    "",
    "One thread, CPU seconds, medians of {rounds} rounds with all arms in turn (`batched_mm`: a quarter);"
    " ratios are against the plain model with its experts computed in the same way, in brackets their middle half."
    " Qwen3-MoE with random weights in float32, 2 layers. `tiny` is the mixture that the tests of `run` train: 64"
    " wide, 4 experts of 64, 2 a token; a training step over 128 x 60 tokens, generation of 128 answers of 40"
    " tokens. `wide` is 256 wide with 16 experts of 128, 4 a token, over 8 x 64 tokens: rounding weights counts the"
    " most there. Made by `benchmarks/experts.py --write`.",
)

if __name__ == "__main__":
    measure(HEAD, (table,), 20, RESULTS)
