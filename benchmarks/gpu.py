"""What injection costs on a GPU: a generated token, a training step, and one layer of a Qwen2-shaped model of 1.5B.

    python benchmarks/gpu.py [--rounds 5] [--small] [--dry]     writes benchmarks/results/<gpu>-injection.md

Skipped without CUDA. Weights are random, which changes no time. One model serves all arms: an injection is attached,
called without being timed until the evidence looks at few calls, timed, and taken out; a plain round stands before the
first arm and after the last. `--small` takes a narrow model, to try the program itself.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fp4rl.inject.attach import Attachment, attach
from fp4rl.spec.injection import Injection

MODES = ("w4a16", "w4a8", "w4a4", "nvfp4_w4a16", "nvfp4_w4a4")
AIMS = {("generation", "w4a16"): 1.03, ("training", "w4a16"): 1.15, ("training", "w4a4"): 1.40}
RESULTS = Path(__file__).parent / "results"
WIDE = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
NARROW = WIDE | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
NARROW |= {"vocab_size": 1024}
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 64, 128, 32
ROWS, LENGTH = 16, 512  # of a training step
WARM = 17  # training steps before timing: the next look is at the 32nd


def model_of(sizes: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """The model in bfloat16, with random weights."""
    config = Qwen2Config(**sizes, max_position_embeddings=4096, dtype="bfloat16", pad_token_id=0, eos_token_id=None)
    with device:
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).to(torch.bfloat16)


class Deeds:
    """Generation and training of one model, whatever is attached to it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-9, fused=model.device.type == "cuda")
        drawn = torch.Generator().manual_seed(0)
        shape = (max(PROMPTS, ROWS), max(PROMPT_LENGTH, LENGTH))
        self.ids = torch.randint(5, 1000, shape, generator=drawn).to(model.device)

    def generation(self) -> None:
        """64 answers of 32 tokens to prompts of 128, with a cache."""
        self.model.eval()
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        with torch.no_grad():
            prompts = self.ids[:PROMPTS, :PROMPT_LENGTH]
            self.model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **length)

    def training(self) -> None:
        """Forward, backward and an optimizer step over 16 x 512 tokens."""
        self.model.train()
        ids = self.ids[:ROWS, :LENGTH]
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(deed: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    deed()
    synchronize()
    return time.perf_counter() - start


def whole_model(deeds: Deeds, rounds: int, synchronize: Callable[[], None]) -> Iterator[str]:
    """One row a deed, one column an arm."""

    def timed(deed: Callable[[], None], attached: Attachment | None = None) -> list[float]:
        def once() -> None:
            if attached is not None:
                attached.set_phase("rollout" if deed == deeds.generation else "training")  # as a run does
            deed()

        # The evidence looks at calls 1, 2, 4, 8, ... of a layer, where a generated token is a call.
        for _ in range(2 if deed == deeds.generation else WARM if attached is not None else 1):
            once()
        return [seconds(once, synchronize) for _ in range(rounds)]

    yield "| | plain | " + " | ".join(MODES) + " |"
    yield "|---" * (len(MODES) + 2) + "|"
    for deed in (deeds.generation, deeds.training):
        plain, taken = timed(deed), {}
        for mode in MODES:
            with attach(deeds.model, Injection.named(mode)) as attached:
                taken[mode] = timed(deed, attached)
        base = statistics.median(plain + timed(deed))
        cells = []
        for mode, found in taken.items():
            aim = AIMS.get((deed.__name__, mode))
            ratio, low, high = (value / base for value in (statistics.median(found), min(found), max(found)))
            cells.append(f"{ratio:.3f} ({low:.2f}-{high:.2f})" + (f", aim {aim:.2f}" if aim else ""))
        yield f"| {deed.__name__} | {1000 * base:.0f} ms | " + " | ".join(cells) + " |"


def one_layer(
    sizes: dict[str, Any], device: torch.device, rounds: int, synchronize: Callable[[], None]
) -> Iterator[str]:
    """The widest layer alone: what rounding costs beside a large matmul."""
    width, wide = sizes["hidden_size"], sizes["intermediate_size"]
    yield f"| nn.Linear({width}, {wide}) in bfloat16 on {ROWS * LENGTH} tokens | plain | " + " | ".join(MODES) + " |"
    yield "|---" * (len(MODES) + 2) + "|"
    layer = nn.Linear(width, wide, bias=False, dtype=torch.bfloat16, device=device)
    x = torch.randn(ROWS * LENGTH, width, dtype=torch.bfloat16, device=device, requires_grad=True)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def backward() -> None:
        layer(x).sum().backward()

    def microseconds(deed: Callable[[], None], calls: int = 20) -> float:
        def block() -> None:
            for _ in range(calls):
                deed()

        block()
        return min(seconds(block, synchronize) for _ in range(rounds)) / calls * 1e6

    for deed, phase in ((forward, "rollout"), (backward, "training")):
        plain = microseconds(deed)
        cells = []
        for mode in MODES:
            with attach(layer, Injection.named(mode)) as attached:
                attached.set_phase(phase)
                cells.append(f"{microseconds(deed) - plain:+.0f} us")
        yield f"| {deed.__name__} | {plain:.0f} us | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a narrow model, on the CPU too; writes nothing")
    parser.add_argument("--dry", action="store_true", help="print the tables and write nothing")
    asked = parser.parse_args()
    there = torch.cuda.is_available()
    if not there and not asked.small:
        print("skipped: the GPU benchmark needs a CUDA device")
        return
    warnings.simplefilter("ignore")
    device, synchronize = torch.device("cuda" if there else "cpu"), torch.cuda.synchronize if there else lambda: None
    name = torch.cuda.get_device_name() if there else "CPU"
    lines = [
        f"# What injection costs on one {name}",
        "",
        f"Seconds on the wall between two synchronizations, medians of {asked.rounds} rounds; ratios are against the "
        "plain model before and after all arms, in brackets the lowest and the highest. Qwen2-shaped model of 1.5B "
        f"(1536 wide, 28 layers, bfloat16, random weights): {PROMPTS} answers of {NEW_TOKENS} tokens to prompts of "
        f"{PROMPT_LENGTH}; training over {ROWS} x {LENGTH} tokens with AdamW. torch {torch.__version__}. Made by "
        "`benchmarks/gpu.py`.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sizes = NARROW if asked.small else WIDE
    parts = (
        one_layer(sizes, device, asked.rounds, synchronize),
        whole_model(Deeds(model_of(sizes, device)), asked.rounds, synchronize),
    )
    for part in parts:
        lines.append("")
        for line in part:
            lines.append(line)
            print(line, flush=True)
    if there and not (asked.small or asked.dry):
        named = name.lower().replace(" ", "-")
        RESULTS.joinpath(f"{named}-injection.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
