"""What transforms of the start model do to W4A4 by value, and what they cost at the start of a run.

    python benchmarks/transforms.py [--cache FOLDER] [--write]

The embedded model after its warm-up, and the same function with outliers in its inputs: three channels of every norm
times 30, and what reads them divided by it. `--write` puts the tables into benchmarks/results/transforms.md.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4rl.diagnose.calibration import Calibration, calibrate
from fp4rl.diagnose.passes import divergence_of, reference_of, weighted
from fp4rl.diagnose.scan import scan
from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.models.quiet import quiet
from fp4rl.models.transforms.start import apply
from fp4rl.models.transforms.structure import structure_of
from fp4rl.rl.inputs import warmed_up
from fp4rl.sites.observe import observe
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded, Model
from fp4rl.spec.scan import Scan
from fp4rl.tasks.arithmetic import Arithmetic

TRANSFORMS: dict[str, list[str]] = {
    "none": [],
    "rotate_residual": ["rotate_residual"],
    "rotate_heads": ["rotate_heads"],
    "smooth": ["smooth"],
    "both rotations": ["rotate_residual", "rotate_heads"],
    "smooth, then both rotations": ["smooth", "rotate_residual", "rotate_heads"],
}
# What is done at each call in place of a transform of the weights: to weights and to inputs. The inputs of the last row
# are the control of the one before, with about its bits.
ONLINE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none; rotation: 32 online": ({"rotation": 32}, {"rotation": 32}),
    "none; fallback: 0.25": ({}, {"fallback": 0.25}),
    "none; inputs in mxfp6_e2m3": ({}, {"name": "mxfp6_e2m3", "factor": "tensor"}),
}
FORMATS = ("mxfp4", "nvfp4")
OUTLIERS, TIMES = 3, 30.0
TEXTS = 64
RESULTS = Path(__file__).parent / "results" / "transforms.md"


@torch.no_grad()
def with_outliers(model: Any) -> Any:
    """Make channels of every norm's output large without a change of the function."""
    structure = structure_of(model)
    for path, sites in structure.readers.items():
        if all(site.role != "lm_head" for site in sites):
            model.get_submodule(path).weight[:OUTLIERS] *= TIMES
            for site in sites:
                structure.linear(site).weight[:, :OUTLIERS] /= TIMES
    return model


def peaks(model: Any, paths: list[str], texts: Calibration) -> float:
    """Return the median over tokens and layers of the largest magnitude of an input over its root mean square."""
    seen: list[Tensor] = []
    with observe(model, paths, on_input=lambda _, x: seen.append(x.abs().amax(-1) / x.square().mean(-1).sqrt())):
        for batch in texts.batches:
            model(input_ids=batch.ids, attention_mask=batch.mask)
    return float(torch.cat(seen).median())


@torch.no_grad()
def row(model: Any, injection: Injection, texts: Calibration) -> list[str]:
    """Return SQNR of weights and inputs, peaks of inputs, and the KL of the whole model to itself unrounded."""
    report = scan(model, injection, texts=texts, spec=Scan(parts=("precision",)))
    sqnr = {
        part: statistics.fmean(own.measures["sqnr_db"] for own in report.parts if own.part == part)
        for part in ("weight", "input")
    }
    paths = [plan.site.path for plan in report.table.plans]
    largest = peaks(model, paths, texts)
    references = [reference_of(model, batch) for batch in texts.batches]
    with attach(model, injection) as attachment:
        attachment.set_phase("evaluation")
        apart = [divergence_of(model, b, r) for b, r in zip(texts.batches, references, strict=True)]
    kl = weighted(apart, [int(batch.mask.sum()) for batch in texts.batches]).kl
    return [f"{sqnr['weight']:.2f}", f"{sqnr['input']:.2f}", f"{largest:.2f}", f"{kl:.4f}"]


def table(folder: Path, name: str, *, outliers: bool) -> Iterator[str]:
    """Yield a row for every format and transform of one model."""
    problems = Arithmetic().problems("train", TEXTS)
    tokenizer: Any = load(folder)[1]
    words = [f"{problem.prompt} {problem.solution}" for problem in problems]
    texts, rows = calibrate(tokenizer, words), [list(tokenizer(text)["input_ids"]) for text in words[:32]]
    yield f"| {name}, W4A4 | weights, dB | inputs, dB | largest / rms of inputs | KL, nats a token | start, s |"
    yield "|---" * 6 + "|"
    for fmt in FORMATS:
        for label in (*TRANSFORMS, *ONLINE):
            model = with_outliers(load(folder)[0]) if outliers else load(folder)[0]
            begun = time.process_time()
            apply(model, Model(transforms=TRANSFORMS.get(label, [])).transforms, rows)
            spent = time.process_time() - begun
            weight, given = ONLINE.get(label, ({}, {}))
            usual = {"name": fmt, "factor": "per_token" if fmt == "nvfp4" else "tensor"}
            injection = Injection.model_validate({"weight": {"name": fmt} | weight, "input": usual | given})
            cells = row(model, injection, texts)
            yield f"| {fmt}: {label} | {' | '.join(cells)} | {spent:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="What transforms do to W4A4 by value")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fp4rl-models")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    quiet()
    folder = warmed_up(Embedded(), Arithmetic(), asked.cache)
    lines = [
        "# What transforms of the start model do by value",
        "",
        f"{TEXTS} texts of the arithmetic task. Means over layers, SQNR in dB; the last column is CPU seconds of one "
        "thread. Made by `benchmarks/transforms.py --write`.",
    ]
    for name, outliers in (("embedded model", False), ("with planted outliers", True)):
        lines.append("")
        for line in table(folder, name, outliers=outliers):
            print(line, flush=True)
            lines.append(line)
    if asked.write:
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
