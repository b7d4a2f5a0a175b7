"""Hardware faults planted in a trained model, and healthy models: does the scan name the layer and the kind?

    python benchmarks/faults.py [--folder build/scan-benchmark] [--write]

6 kinds x 5 layers x 3 magnitudes x 2 extents in the embedded model after its warm-up. `--write` puts the figures into
benchmarks/results/faults.md, and the tables also into docs/concepts/diagnosis.md, between its two marks.
"""

import argparse
import os
import platform
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import nn

from fp4rl.diagnose.calibration import Calibration, calibrate, from_tokens
from fp4rl.diagnose.dynamics import Dynamics, dynamics
from fp4rl.diagnose.suspects import suspects
from fp4rl.inject.attach import Attachment, attach
from fp4rl.inject.plan import SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load
from fp4rl.models.quiet import quiet
from fp4rl.rl.inputs import warmed_up
from fp4rl.sites.observe import observe
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded
from fp4rl.tasks.arithmetic import Arithmetic

LAYERS, PROMPTS = 5, 8
MAGNITUDES = (0.3, 0.03, 0.003)
EXTENTS = {"dense": "dense: all 7 matmuls of the layer", "sparse": "sparse: 1 of its 7"}
KINDS = {
    "jitter": "non-determinism",
    "dead_zone": "dead zone",
    "stuck": "stuck channel",
    "saturation": "saturation",
    "spikes": "spikes",
    "bias": "bias",
}
TRAINED_PROBES, FRESH_SEEDS, FRESH_PROBES = 25, 5, 5
DOCS = Path(__file__).parents[1] / "docs" / "concepts" / "diagnosis.md"
MARKS = ("<!-- benchmarks/faults.py --write -->", "<!-- end of benchmarks/faults.py -->")
Sizes = dict[str, tuple[float, float]]


def faults(folder: Path) -> list[str]:
    """6 kinds x 5 layers x 3 magnitudes x 2 extents on the trained embedded model, and healthy models beside."""
    model, calibration = trained(folder, seed=0)
    table = resolve(model, Injection.named("w4a16"))
    sizes = output_sizes(model, table, calibration)
    right: Counter[tuple[float, str]] = Counter()
    confusion: Counter[tuple[str, str]] = Counter()
    missed: Counter[tuple[str, float, str]] = Counter()
    for magnitude in MAGNITUDES:
        for extent in EXTENTS:
            for kind, name in KINDS.items():
                for layer in range(LAYERS):
                    with planted(model, table, sizes, kind, layer, magnitude, extent):
                        verdict = suspects(probed(model, table, calibration))
                    hit = (verdict.layer, verdict.kind) == (layer, name)
                    right[magnitude, extent] += hit
                    if (magnitude, extent) == (0.3, "dense"):
                        confusion[name, verdict.kind if verdict.layer == layer else "wrong layer"] += 1
                    if not hit:
                        missed[name, magnitude, extent] += 1
    return [*share_table(right), "", *confusion_table(confusion), "", *missed_lines(missed), "", *healthy(folder)]


def share_table(right: Counter[tuple[float, str]]) -> list[str]:
    lines = [f"| magnitude | {' | '.join(EXTENTS.values())} |", "|---|---|---|"]
    for magnitude in MAGNITUDES:
        cells = (f"{right[magnitude, extent]} of {len(KINDS) * LAYERS}" for extent in EXTENTS)
        lines.append(f"| {magnitude:g} | {' | '.join(cells)} |")
    return lines


def confusion_table(confusion: Counter[tuple[str, str]]) -> list[str]:
    names = [*KINDS.values(), *sorted({str(f) for _, f in confusion} - set(KINDS.values()))]
    lines = [f"| planted (0.3, dense) | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    cells = {name: [str(confusion[name, other] or "") for other in names] for name in KINDS.values()}
    return [*lines, *(f"| {name} | {' | '.join(found)} |" for name, found in cells.items())]


def missed_lines(missed: Counter[tuple[str, float, str]]) -> list[str]:
    """Which kinds were missed where."""
    if not missed:
        return [f"None of the {len(KINDS) * LAYERS * len(MAGNITUDES) * len(EXTENTS)} was missed."]
    names = dict.fromkeys((name, magnitude) for name, magnitude, _ in missed)
    said = (
        f"{name} at {magnitude:g} ({', '.join(f'{missed[name, magnitude, extent]} {extent}' for extent in EXTENTS)})"
        for name, magnitude in names
    )
    return [f"Missed, of {LAYERS} each:", *(f"- {one}" for one in said)]


def healthy(folder: Path) -> list[str]:
    """False alarms: trained models in two dtypes, and freshly made ones of four families and three widths."""
    alarms: Counter[str] = Counter()
    probes: Counter[str] = Counter()
    models: Counter[str] = Counter()

    def ask(kind: str, model: nn.Module, calibration: Calibration, draws: int) -> None:
        table = resolve(model, Injection.named("w4a16"))
        models[kind] += 1
        for draw in range(draws):
            verdict = suspects(probed(model, table, calibration, draw))
            alarms[kind] += bool(verdict.suspects or verdict.everywhere)
            probes[kind] += 1

    for seed in (0, 1):
        for dtype in ("float32", "bfloat16"):
            ask("trained", *trained(folder, seed=seed, dtype=dtype), TRAINED_PROBES)
    rows = torch.randint(0, 512, (PROMPTS, 32), generator=torch.Generator().manual_seed(0)).tolist()
    for family in ("Qwen2", "Qwen3", "Llama", "Mistral"):
        for width in (64, 128, 256):
            for seed in range(FRESH_SEEDS):
                ask("untrained", fresh(family, width, seed), from_tokens(rows, batch_size=PROMPTS), FRESH_PROBES)
    return [
        "| healthy models | models | probes | false alarms |",
        "|---|---|---|---|",
        f"| embedded model after two warm-ups, in float32 and bfloat16 | {models['trained']} | {probes['trained']} | "
        f"{alarms['trained']} |",
        f"| Qwen2, Qwen3, Llama, Mistral as made, widths 64 to 256 | {models['untrained']} | {probes['untrained']} | "
        f"{alarms['untrained']} |",
    ]


def fresh(family: str, width: int, seed: int) -> nn.Module:
    """A model of that family with the weights it is born with, 4 layers deep."""
    import transformers

    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 4}
    config = getattr(transformers, f"{family}Config")(**shape, **heads)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.eval()


def trained(folder: Path, seed: int, dtype: str = "float32") -> tuple[nn.Module, Calibration]:
    place = warmed_up(Embedded(num_layers=LAYERS, seed=seed), Arithmetic(), folder / "models")
    model, tokenizer = load(place, dtype)
    texts = [f"{p.prompt} {p.solution}" for p in Arithmetic().problems("train", PROMPTS)]
    return model, calibrate(tokenizer, texts)


def probed(model: nn.Module, table: SiteTable, calibration: Calibration, seed: int = 0) -> Dynamics:
    return dynamics(model, table, calibration, generator=torch.Generator().manual_seed(seed))


def output_sizes(model: nn.Module, table: SiteTable, calibration: Calibration) -> Sizes:
    """Site -> root mean square and greatest magnitude of its healthy output."""
    found: Sizes = {}

    def watch(name: str, tokens: torch.Tensor) -> None:
        found[name] = (float(tokens.square().mean().sqrt()), float(tokens.abs().max()))

    with observe(model, [plan.site.path for plan in table.plans], on_output=watch) as eye:
        batch = calibration.batches[0]
        eye.mask = batch.mask
        model(input_ids=batch.ids, attention_mask=batch.mask)
    return found


def planted(
    model: nn.Module, table: SiteTable, sizes: Sizes, kind: str, layer: int, magnitude: float, extent: str
) -> Attachment:
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


def into_docs(lines: list[str]) -> None:
    """Between the two marks of the page."""
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    DOCS.write_text("\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + after]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/scan-benchmark"))
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    quiet()
    found = faults(given.folder)
    head = [
        "# Planted faults",
        "",
        f"`python benchmarks/faults.py`, torch {torch.__version__}, {platform.machine()}.",
        "",
    ]
    print("\n".join([*head, *found]))
    if given.write:
        out = Path(__file__).parent / "results" / "faults.md"
        out.write_text("\n".join([*head, *found]) + "\n", encoding="utf-8")
        into_docs(found)


if __name__ == "__main__":
    main()
