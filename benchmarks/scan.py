"""The scan's three promises, measured: one pass for all layers, bounded memory, and faults that are found.

    python benchmarks/scan.py [speed] [memory] [faults] [--folder build/scan-benchmark] [--write]

`speed` compares with one pass per layer and prompt on a 28-layer model, `memory` scans a sharded checkpoint of 3 GB in
a fresh process, `faults` plants 180 hardware faults in the embedded model after its warm-up and probes healthy models.
`--write` puts the figures into benchmarks/results/scan.md.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from safetensors.torch import save_file
from torch import nn

from fp4rl.diagnose.calibration import Calibration, calibrate, from_tokens
from fp4rl.diagnose.dynamics import dynamics
from fp4rl.diagnose.precision import input_errors
from fp4rl.diagnose.suspects import suspects
from fp4rl.inject.attach import attach
from fp4rl.inject.plan import SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load
from fp4rl.models.quiet import quiet
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.start import warmed_up
from fp4rl.sites.observe import observe
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded
from fp4rl.tasks.arithmetic import Arithmetic

LAYERS, PROMPTS, TOKENS = 28, 8, 32
MAGNITUDES = (0.3, 0.1, 0.03)
KINDS = {
    "jitter": "non-determinism",
    "dead_zone": "dead zone",
    "stuck": "stuck channel",
    "saturation": "saturation",
    "spikes": "spikes",
    "bias": "bias",
}


# ---------------------------------------------------------------------------------------------------- speed


def speed() -> list[str]:
    """Seconds of one pass for all layers against one pass per layer and prompt, doing the same measurement."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=1024, num_hidden_layers=LAYERS, **shape)).eval()
    table = resolve(model, Injection.named("w4a4"))
    rows = torch.randint(0, 1024, (PROMPTS, TOKENS)).tolist()
    together, apart = from_tokens(rows, batch_size=PROMPTS), [from_tokens([row]) for row in rows]
    one_layer = [of_layer(table, layer) for layer in range(LAYERS)]
    lines = [
        f"{LAYERS} layers, width {shape['hidden_size']}, {PROMPTS} prompts of {TOKENS} tokens: one pass instead of "
        f"{LAYERS * PROMPTS}.",
        "",
        "| what is measured | one pass per layer and prompt, s | one pass for all, s | faster |",
        "|---|---|---|---|",
    ]
    for name, look in (
        ("errors of every input", look_at_inputs),
        ("dynamics and probes of every layer", look_at_dynamics),
    ):
        look(model, table, together)  # warm
        slow = timed(lambda look=look: [look(model, t, one) for t in one_layer for one in apart])
        fast = min(timed(lambda look=look: look(model, table, together)) for _ in range(3))
        lines.append(f"| {name} | {slow:.2f} | {fast:.3f} | {slow / fast:.1f}x |")
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
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


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


def make_checkpoint(place: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    place.mkdir(parents=True, exist_ok=True)
    config.architectures = ["Qwen2ForCausalLM"]
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
    from fp4rl.diagnose.stored import stored_weight_errors
    from fp4rl.diagnose.tally import pooled

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


# --------------------------------------------------------------------------------------------------- faults


def faults(folder: Path) -> list[str]:
    """6 kinds x 5 layers x 3 magnitudes x 2 extents on the trained embedded model, and healthy models beside."""
    model, calibration = trained(folder, seed=0)
    table = resolve(model, Injection.named("w4a16"))
    sizes = output_sizes(model, table, calibration)
    right: Counter[tuple[float, str]] = Counter()
    confusion: Counter[tuple[str, str]] = Counter()
    missed = []
    for magnitude in MAGNITUDES:
        for extent in ("dense", "sparse"):
            for kind, name in KINDS.items():
                for layer in range(5):
                    with planted(model, table, sizes, kind, layer, magnitude, extent):
                        verdict = suspects(probed(model, table, calibration))
                    hit = (verdict.layer, verdict.kind) == (layer, name)
                    right[magnitude, extent] += hit
                    if (magnitude, extent) == (0.3, "dense"):
                        confusion[name, verdict.kind if verdict.layer == layer else "wrong layer"] += 1
                    if not hit:
                        missed.append(f"{name} {magnitude} {extent}, layer {layer}: {verdict.layer}, {verdict.kind}")
    return [*share_table(right), "", *confusion_table(confusion), "", *missed_lines(missed), "", *healthy(folder)]


def share_table(right: Counter[tuple[float, str]]) -> list[str]:
    lines = ["| magnitude | dense: all matmuls of the layer | sparse: one of them |", "|---|---|---|"]
    for magnitude in MAGNITUDES:
        cells = (f"{right[magnitude, extent]} of 30" for extent in ("dense", "sparse"))
        lines.append(f"| {magnitude:g} | {' | '.join(cells)} |")
    return lines


def confusion_table(confusion: Counter[tuple[str, str]]) -> list[str]:
    names = [*KINDS.values(), *sorted({str(f) for _, f in confusion} - set(KINDS.values()))]
    lines = [f"| planted (0.3, dense) | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    cells = {name: [str(confusion[name, other] or "") for other in names] for name in KINDS.values()}
    return [*lines, *(f"| {name} | {' | '.join(found)} |" for name, found in cells.items())]


def missed_lines(missed: list[str]) -> list[str]:
    return [f"Missed: {'; '.join(missed)}." if missed else "None of the 180 was missed."]


def healthy(folder: Path) -> list[str]:
    """False alarms on healthy models: two warm-ups, two dtypes, fifty probes each."""
    alarms = probes = 0
    for seed in (0, 1):
        for dtype in (torch.float32, torch.bfloat16):
            model, calibration = trained(folder, seed=seed, dtype=dtype)
            table = resolve(model, Injection.named("w4a16"))
            for draw in range(50):
                verdict = suspects(probed(model, table, calibration, draw))
                alarms += bool(verdict.suspects or verdict.everywhere)
                probes += 1
    return [f"Healthy models (2 warm-ups, float32 and bfloat16, {probes} probes): {alarms} false alarms."]


def trained(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Calibration]:
    place = warmed_up(Embedded(num_layers=5, seed=seed), Arithmetic(), folder / "models")
    model, tokenizer = load(place, dtype)
    texts = [f"{p.prompt} {p.solution}" for p in Arithmetic().problems("train", PROMPTS)]
    return model, calibrate(tokenizer, texts)


def probed(model: nn.Module, table: SiteTable, calibration: Calibration, seed: int = 0):  # type: ignore[no-untyped-def]
    return dynamics(model, table, calibration, generator=torch.Generator().manual_seed(seed))


def output_sizes(model: nn.Module, table: SiteTable, calibration: Calibration) -> dict[str, tuple[float, float]]:
    """Site -> root mean square and greatest magnitude of its healthy output."""
    found: dict[str, tuple[float, float]] = {}

    def watch(name: str, tokens: torch.Tensor) -> None:
        found[name] = (float(tokens.square().mean().sqrt()), float(tokens.abs().max()))

    with observe(model, [plan.site.path for plan in table.plans], on_output=watch) as eye:
        batch = calibration.batches[0]
        eye.mask = batch.mask
        model(input_ids=batch.ids, attention_mask=batch.mask)
    return found


def planted(model, table, sizes, kind, layer, magnitude, extent):  # type: ignore[no-untyped-def]
    """The fault in all matmuls of a layer, or in its last one; sizes are relative to each site's own output."""
    sites = [plan.site for plan in table.plans if plan.site.layer == layer]
    errors = []
    for site in sites if extent == "dense" else sites[-1:]:
        rms, greatest = sizes[site.path]
        scale = {
            "jitter": magnitude,
            "saturation": (1 - magnitude) * greatest,
            "spikes": magnitude * greatest,
        }.get(kind, magnitude * rms)
        share = {"spikes": 0.01, "stuck": 0.1}.get(kind)
        errors.append(HardwareError(kind=kind, scale=scale, share=share, targets={"take": [site.name]}))
    attachment = attach(model, Injection(errors=tuple(errors)))
    attachment.set_phase("rollout")
    return attachment


# ---------------------------------------------------------------------------------------------------- frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["speed", "memory", "faults", []], default=[])
    parser.add_argument("--folder", type=Path, default=Path("build/scan-benchmark"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the 3 GB checkpoint")
    parser.add_argument("--scan-child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.scan_child:
        scan_child(given.scan_child)
        return
    quiet()
    wanted = given.what or ["speed", "memory", "faults"]
    lines = [
        "# Scan",
        "",
        f"`python benchmarks/scan.py`, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} of {os.cpu_count()} cores.",
    ]
    for title, name, work in (
        ("One pass for all layers", "speed", speed),
        ("Memory", "memory", lambda: memory(given.folder)),
        ("Planted faults", "faults", lambda: faults(given.folder)),
    ):
        if name in wanted:
            lines += ["", f"## {title}", "", *work()]
    print("\n".join(lines))
    if given.write:
        out = Path(__file__).parent / "results" / "scan.md"
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not given.keep:
        shutil.rmtree(given.folder / "checkpoint-1.5b", ignore_errors=True)


if __name__ == "__main__":
    main()
