"""Three promises of the scan, measured: one pass for all layers, bounded memory, and an estimate that ranks truly.

    python benchmarks/scan.py [speed] [memory] [sensitivity] [--folder build/scan-benchmark] [--write]

`speed` compares with one pass per layer and prompt on a 28-layer model, `memory` scans a sharded checkpoint of 3 GB in
a fresh process, `sensitivity` compares the estimate of one backward pass with rounding one site at a time, on the
embedded model after its warm-up and, with `--stories FOLDER`, on the trained Llama of 260 k parameters (llama2.c).
`--write` puts each section into benchmarks/results/scan.md when it is done; planted faults are benchmarks/faults.py.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from safetensors.torch import save_file
from torch import nn

from fp4rl.diagnose.calibration import ENOUGH_TEXTS, Calibration, calibrate, from_tokens
from fp4rl.diagnose.dynamics import dynamics
from fp4rl.diagnose.precision import input_errors
from fp4rl.diagnose.scan import scan
from fp4rl.diagnose.sensitivity import rank_correlation
from fp4rl.inject.plan import SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load
from fp4rl.models.quiet import quiet
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.inputs import warmed_up
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded
from fp4rl.spec.scan import Scan
from fp4rl.tasks.arithmetic import Arithmetic

LAYERS, PROMPTS, TOKENS = 28, 8, 32
RESULTS = Path(__file__).parent / "results" / "scan.md"


# ---------------------------------------------------------------------------------------------------- speed


def speed() -> list[str]:
    """Seconds of one pass for all layers against one pass per layer and prompt, doing the same measurement."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # processor time is then what the work itself takes, whatever else runs
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=1024, num_hidden_layers=LAYERS, **shape)).eval()
    table = resolve(model, Injection.named("w4a4"))
    rows = torch.randint(0, 1024, (PROMPTS, TOKENS)).tolist()
    together, apart = from_tokens(rows, batch_size=PROMPTS), [from_tokens([row]) for row in rows]
    one_layer = [of_layer(table, layer) for layer in range(LAYERS)]
    lines = [
        f"{LAYERS} layers, width {shape['hidden_size']}, {PROMPTS} prompts of {TOKENS} tokens: one pass instead of "
        f"{LAYERS * PROMPTS}. Processor time of one thread, best of three rounds.",
        "",
        "| what is measured | one pass per layer and prompt, s | one pass for all, s | faster |",
        "|---|---|---|---|",
    ]
    for name, look in (
        ("errors of every input", look_at_inputs),
        ("dynamics and probes of every layer", look_at_dynamics),
    ):
        look(model, table, together)  # warm
        slow, fast = inf, inf
        for _ in range(3):  # in turns, so that what else runs meets both
            slow = min(slow, timed(lambda look=look: [look(model, t, one) for t in one_layer for one in apart]))
            fast = min(fast, *(timed(lambda look=look: look(model, table, together)) for _ in range(5)))
        lines.append(f"| {name} | {slow:.2f} | {fast:.3f} | {slow / fast:.1f}x |")
    torch.set_num_threads(threads)
    return lines


def of_layer(table: SiteTable, layer: int) -> SiteTable:
    """The table as the older tool walked it: one layer at a time."""
    return replace(
        table,
        plans=tuple(p for p in table.plans if p.site.layer == layer),
        left_out=tuple(left for left in table.left_out if left.site.layer == layer),
    )


def look_at_inputs(model: nn.Module, table: SiteTable, calibration: Calibration) -> None:
    input_errors(model, table, calibration)


def look_at_dynamics(model: nn.Module, table: SiteTable, calibration: Calibration) -> None:
    dynamics(model, table, calibration, generator=torch.Generator().manual_seed(0))


def timed(work) -> float:  # type: ignore[no-untyped-def]
    began = time.process_time()
    work()
    return time.process_time() - began


# --------------------------------------------------------------------------------------------------- memory


def memory(folder: Path) -> list[str]:
    """Peak memory of `fp4rl scan --weights-only` on a checkpoint of the shape of Qwen2.5-1.5B in bfloat16."""
    place = folder / "checkpoint-1.5b"
    if not (place / "model.safetensors.index.json").is_file():
        make_checkpoint(place)
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    began = time.perf_counter()
    command = [sys.executable, __file__, "--scan-child", str(place)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        f"{size / 1e9:.2f} GB in {len(list(place.glob('*.safetensors')))} shards, {found['sites']} weights: peak "
        f"{found['peak_mb']:.0f} MB of memory ({found['before_mb']:.0f} MB of it before the first weight, mostly "
        f"libraries), {time.perf_counter() - began:.0f} s with {torch.get_num_threads()} threads.",
    ]


def make_checkpoint(place: Path, layers: int = LAYERS) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    place.mkdir(parents=True, exist_ok=True)
    config.architectures, config.dtype = ["Qwen2ForCausalLM"], torch.bfloat16
    config.save_pretrained(place)
    build_tokenizer().save_pretrained(place)
    generator, where = torch.Generator().manual_seed(0), {}
    for number, group in enumerate(grouped([(n, p.shape) for n, p in model.named_parameters()], 160_000_000)):
        tensors = {n: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for n, shape in group}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, place / file)
        where |= dict.fromkeys(tensors, file)
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def grouped(tensors: list[tuple[str, torch.Size]], values: int) -> Iterator[list[tuple[str, torch.Size]]]:
    group: list[tuple[str, torch.Size]] = []
    for name, shape in tensors:
        group.append((name, shape))
        if sum(s.numel() for _, s in group) > values:
            yield group
            group = []
    if group:
        yield group


def scan_child(place: str) -> None:
    """What `memory` measures, in a process of its own."""
    from fp4rl.diagnose.precision import stored_weight_errors
    from fp4rl.numerics.errors import pooled

    quiet()
    before = peak_mb()
    _, parts, tallies = stored_weight_errors(place, Injection.named("w4a16"))
    found = {
        "sites": len(parts),
        "before_mb": before,
        "peak_mb": peak_mb(),
        "sqnr_db": pooled(list(tallies.values())).measures()["sqnr_db"],
    }
    print(json.dumps(found))


def peak_mb() -> float:
    """High-water mark of this process's own memory; `getrusage` would count the parent that it was forked from."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


# ---------------------------------------------------------------------------------------------- sensitivity


def estimates(folder: Path, stories: Path | None) -> list[str]:
    """Rank correlation of the estimate, and of a weight's error, with the KL of rounding one site alone."""
    lines = [
        "| model, mode | sites | rank correlation of estimate and measured | of a weight's error and measured "
        "| sum of estimates / of measured |",
        "|---|---|---|---|---|",
    ]
    for name, model, calibration in models(folder, stories):
        for mode in ("w4a16", "w4a4"):
            report = scan(
                model, Injection.named(mode), texts=calibration, spec=Scan(parts=("precision", "sensitivity"))
            )
            found = report.sensitivity
            estimated, measured = sum(s.estimate for s in found.sites), sum(s.leave_one_in.kl for s in found.sites)
            error = {part.site: part.measures["relative_l2"] for part in report.parts if part.part == "weight"}
            size = rank_correlation([error[s.name] for s in found.sites], [s.leave_one_in.kl for s in found.sites])
            lines.append(
                f"| {name}, {mode.upper()} | {len(found.sites)} | {found.rank_correlation:.3f} | "
                f"{size:.2f} | {estimated / measured:.2f} |"
            )
    return lines


def models(folder: Path, stories: Path | None) -> Iterator[tuple[str, nn.Module, Calibration]]:
    texts = [f"{p.prompt} {p.solution}" for p in Arithmetic().problems("train", ENOUGH_TEXTS)]
    for layers in (2, 5):
        model, tokenizer = load(warmed_up(Embedded(num_layers=layers), Arithmetic(), folder / "models"), "float32")
        yield f"embedded, {layers} layers", model, calibrate(tokenizer, texts)
    if stories is not None:
        yield "stories260K, 5 layers", *trained_llama(stories)


def trained_llama(folder: Path) -> tuple[nn.Module, Calibration]:
    """The tests hold the converter."""
    place = Path(__file__).parents[1] / "tests" / "diagnose" / "stories260k.py"
    spec = importlib.util.spec_from_file_location("stories260k", place)
    assert spec is not None
    assert spec.loader is not None
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    text = (folder / "tinystories_sample.txt").read_text().replace("\n", " ")
    ids = converter.encode(folder, text)
    return converter.load_stories(folder), from_tokens([ids[i : i + 32] for i in range(0, len(ids) - 31, 32)][:32])


# ---------------------------------------------------------------------------------------------------- frame


def keep(title: str, lines: list[str]) -> None:
    """Put one section into the results, in place of its last one."""
    head = ["# Scan", "", f"`python benchmarks/scan.py`, torch {torch.__version__}, {platform.machine()}.", ""]
    old = RESULTS.read_text(encoding="utf-8").split("\n## ")[1:] if RESULTS.is_file() else []
    sections = {one.splitlines()[0]: f"## {one}".rstrip() for one in old} | {title: "\n".join(lines)}
    RESULTS.write_text("\n".join(head) + "\n" + "\n\n".join(sections.values()) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["speed", "memory", "sensitivity", []], default=[])
    parser.add_argument("--folder", type=Path, default=Path("build/scan-benchmark"))
    parser.add_argument("--stories", type=Path, help="folder of the trained Llama of 260 k parameters")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the 3 GB checkpoint")
    parser.add_argument("--scan-child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.scan_child:
        scan_child(given.scan_child)
        return
    quiet()
    parts = {
        "speed": ("One pass for all layers", speed),
        "sensitivity": ("Sensitivity: estimated and measured", lambda: estimates(given.folder, given.stories)),
        "memory": ("Memory", lambda: memory(given.folder)),
    }
    for name in given.what or parts:
        title, work = parts[name]
        lines = [f"## {title}", "", *work()]
        print("\n".join(lines), end="\n\n", flush=True)
        if given.write:
            keep(title, lines)
    if not given.keep:
        shutil.rmtree(given.folder / "checkpoint-1.5b", ignore_errors=True)


if __name__ == "__main__":
    main()
