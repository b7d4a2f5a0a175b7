"""What a run will take: memory for its weights and optimizer, time by what earlier runs of its kind took.

No torch is imported, and no weight read: safetensors files say the shapes of their tensors in their headers.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.runs import Run
from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.model import Lora
from fp4rl.spec.words import counted

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_FLOATS = ("F64", "F32", "F16", "BF16")
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_STATES = {"8bit": 1.0, "4bit": 0.5}  # bytes of each of AdamW's two states, by the end of its optimizer's name
_ALIKE = ("train_batch_size", "rollout_n", "mini_batch_size", "max_response_length", "algorithm")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Memory:
    """Bytes of each process by what they are for. Activations, logits and caches of generation come on top."""

    parts: Mapping[str, float]

    @property
    def whole(self) -> float:
        """Their sum."""
        return sum(self.parts.values())

    def words(self) -> str:
        """Return it in GiB, with its parts."""
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.parts.items())
        return f"{_gib(self.whole)} GiB ({parts})"


def memory_of(experiment: Experiment) -> Memory | None:
    """Return what a process of the run holds for as long as it trains; None where the folder does not say its shapes:
    it is the embedded model, packed, or holds no safetensors."""
    model, recipe, injection = experiment.model, experiment.training, experiment.injection
    shapes = shapes_of(Path(model.path)) if model.path is not None else None
    if not shapes:
        return None
    wide, all_of_them = _BYTES[model.dtype], float(sum(map(prod, shapes.values())))
    trained = all_of_them if model.lora is None else float(adapter_size(shapes, model.lora))
    fine = model.lora is not None or not model.coarse_masters
    each = _BYTES["float32"] if fine else wide
    parts = {"weights": all_of_them * wide}
    if model.lora is not None:
        parts["adapter"] = trained * each
    elif fine and (model.dtype != "float32" or recipe.learned_clipping is not None):
        parts["FP32 masters"] = trained * each
    if recipe.ema is not None:
        parts["average"] = trained * _BYTES["float32"]
    parts["gradients"] = trained * each
    parts["optimizer"] = 2 * trained * _STATES.get(recipe.optimizer[-4:], each)
    if recipe.kl and model.lora is None:
        parts["reference"] = all_of_them * wide
    packed = injection is not None and injection.frozen_base == "packed" and model.lora is not None
    if injection is not None and injection.weight is not None and not packed:
        parts["rounded copies"] = float(sum(map(prod, _linear(shapes).values()))) * wide
    if experiment.sharding == "fsdp2":
        parts = {name: size / experiment.processes for name, size in parts.items()}
    return Memory(parts)


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of all floating-point weights of a folder; None where something in it is packed."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")) if (folder / "config.json").is_file() else ():
        for name, entry in _header(file).items():
            if name == "__metadata__":
                continue
            if entry.get("dtype") not in _FLOATS:
                return None
            shapes[name] = tuple(entry["shape"])
    return shapes or None


def adapter_size(shapes: Shapes, lora: Lora) -> int:
    """Return the number of weights of an adapter: rank x (in + out) for every layer that it is on."""
    chosen = lora.target_modules
    return sum(
        prod(shape[:-2]) * lora.rank * (shape[-1] + shape[-2])
        for name, shape in _linear(shapes).items()
        if "all-linear" in chosen or name.removesuffix(".weight").rpartition(".")[2] in chosen
    )


def _linear(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the matrices inside the layers: no embedding, no head."""
    outside = ("embed", "lm_head", "wte", "wpe")
    return {n: s for n, s in shapes.items() if len(s) >= 2 and not any(word in n for word in outside)}


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            content = json.loads(opened.read(size)) if size <= _HEADER_LIMIT else {}
    except (OSError, ValueError):  # the run names the damage
        return {}
    return content if isinstance(content, dict) else {}


def available() -> tuple[str, float] | None:
    """Return the device that a run would use here and its memory in bytes, as its driver tells it; None where that is
    not known (of Ascend's, for example)."""
    if (tool := shutil.which("nvidia-smi")) is not None:
        asked_for = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run([tool, *asked_for], capture_output=True, text=True, check=False)
        name, _, mib = done.stdout.partition("\n")[0].rpartition(",")
        if done.returncode == 0 and mib.strip().isdigit():
            return name.strip(), float(mib) * 2**20
    if any(Path("/dev").glob("davinci[0-9]*")):
        return None
    try:
        return "this machine", float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        return None


def time_of(run: PlannedRun, earlier: Sequence[Run]) -> tuple[float, str] | None:
    """Return the seconds that a run will take by `earlier` ones, and by which; None where none is of its kind.

    Those of the same experiment count, other seeds included; else those of the same task, model, batches and number of
    processes, by their time a step.
    """
    took = [each for each in earlier if each.result.wall_s and each.result.steps_done]
    described = run.experiment.model_dump(mode="json")
    same = [each for each in took if each.experiment == digest({k: v for k, v in described.items() if k != "seed"})]
    if same:
        seconds = [each.result.wall_s or 0.0 for each in same if not each.result.stopped]
        if seconds:
            return median(seconds), counted(len(seconds), "run of this experiment", "runs of this experiment")
    alike = [each for each in took if _kind(each.spec) == _kind(described)]
    if not alike:
        return None
    step = median((each.result.wall_s or 0.0) / (each.result.steps_done or 1) for each in alike)
    return step * run.experiment.training.steps, counted(len(alike), "run like it", "runs like it")


def _kind(spec: Mapping[str, Any]) -> str:
    recipe = spec.get("training") or {}
    parts = [spec.get("task"), spec.get("model"), spec.get("processes", 1), *(recipe.get(name) for name in _ALIKE)]
    return digest({str(i): part for i, part in enumerate(parts)})


def lines(runs: Sequence[PlannedRun], earlier: Sequence[Run], jobs: int) -> Iterator[str]:
    """Yield lines for `fp4rl plan`: the memory of each arm, against what there is, and the time of all runs."""
    here, by_words = available(), dict[str, list[str]]()
    first = {run.arm: run.experiment for run in runs}
    for arm, experiment in first.items():
        if (memory := memory_of(experiment)) is not None:
            over = ""
            if here is not None and memory.whole > here[1]:
                over = f": more than the {_gib(here[1])} GiB of {here[0]}"
            by_words.setdefault(f"{memory.words()}{over}", []).append(arm)
    for words, arms in by_words.items():
        yield f"memory of {', '.join(arms)}, a process: at least {words}"
    if by_words and here is not None:
        yield f"memory of {here[0]}: {_gib(here[1])} GiB; activations, logits and caches come on top of the above"
    times = [time_of(run, earlier) for run in runs]
    known = [each for each in times if each is not None]
    if known and len(known) == len(runs):
        seconds, by = sum(each[0] for each in known), dict.fromkeys(each[1] for each in known)
        at_once = f", {jobs} at a time {_duration(seconds / jobs)}" if len(runs) > 1 < jobs else ""
        yield f"time: about {_duration(seconds)} of runs{at_once} (by {', '.join(by)})"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
