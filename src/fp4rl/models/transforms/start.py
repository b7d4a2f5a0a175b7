"""The start model after its transforms: an ordinary folder in the cache, with a note of what was done and measured."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import Tensor

from fp4rl.models.load import base_of, dtype_named, embedded_skeleton, load, skeleton
from fp4rl.models.save import save
from fp4rl.models.tiny import one_thread
from fp4rl.models.transforms.note import NOTE
from fp4rl.models.transforms.rotate import rotate_heads, rotate_residual, untie
from fp4rl.models.transforms.smooth import smooth
from fp4rl.numerics import levels
from fp4rl.numerics.device import accelerator
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.model import Embedded, Model
from fp4rl.spec.transforms import RotateHeads, RotateResidual, Transform, Transformed, prompts_needed, unties

TOLERANCE = 1e-3  # of the logits' largest magnitude, in float32; a wrong transform is off by more than a hundredth
_CHECKED_TEXTS, _CHECKED_TOKENS, _LONGEST = 4, 128, 512

Texts = Callable[[int], Sequence[str]]
"""Returns the first so many texts of the task."""


def transformed(start: Path, of_start: str, model: Model, texts: Texts, cache: Path) -> Path:
    """Return the folder of the model in `start`, whose digest is `of_start`, after `model.transforms`; made once.

    Its name holds a digest of all that decides its weights. It is transformed in float32, by products in float64, and
    kept in the dtype of `model`. Raises InvalidValueError for a structure that is not known, and for an adapter;
    CheckFailed where a logit changed by more than TOLERANCE.
    """
    if base_of(start) is not None:
        raise InvalidValueError(f"model.transforms: {start} is an adapter; merge it first (merge_and_unload)")
    seen = texts(max(prompts_needed(model.transforms), _CHECKED_TEXTS))
    needed = prompts_needed(model.transforms)
    made = cache / f"transformed-{digest(_content(of_start, model, seen[:needed]))}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock")):  # released when the process dies
        if not made.is_dir():
            half_made = made.with_suffix(".partial")
            shutil.rmtree(half_made, ignore_errors=True)
            note = _made(start, model, seen, half_made).extended(of=of_start)
            (half_made / NOTE).write_text(json.dumps(note.as_json(), indent=1) + "\n", encoding="utf-8")
            half_made.rename(made)
    return made


def described_skeleton(model: Model, path: str | Path | None) -> Any:
    """Build the modules of a described model, or of the folder `path` in its stead, without the weights of a folder."""
    if path is None:
        built: Any = embedded_skeleton(model.embedded or Embedded())
    else:
        built = skeleton(path, model.experts_implementation)
    if unties(model.transforms):
        untie(built)
    return built


def apply(model: Any, transforms: Sequence[Transform], rows: Sequence[Sequence[int]]) -> None:
    """Transform a causal model in place, in the order given; `rows` of token ids are what `smooth` sees.

    Raises InvalidValueError for a model whose structure is not known.
    """
    for transform in transforms:
        match transform:
            case RotateResidual():
                rotate_residual(model, transform.seed)
            case RotateHeads():
                rotate_heads(model, transform.seed)
            case _:
                smooth(model, transform, rows[: transform.prompts])


def _made(start: Path, spec: Model, texts: Sequence[str], folder: Path) -> Transformed:
    with one_thread():  # sums that are split over another number of threads round differently
        model, tokenizer = load(start, "float32")
        model.to(accelerator() or torch.device("cpu"))
        rows = [list(tokenizer(text)["input_ids"])[:_LONGEST] for text in texts]
        before, tied = _logits(model, rows), model.get_output_embeddings().weight is model.get_input_embeddings().weight
        apply(model, spec.transforms, rows)
        largest = _difference(before, _logits(model, rows))
        names = ", ".join(transform.name for transform in spec.transforms)
        if not largest <= TOLERANCE:
            raise CheckFailed(
                f"model.transforms: {names} changed the logits of {start} by up to {largest:.2g} of their largest "
                f"magnitude, and {TOLERANCE:g} is allowed: its structure is another than it seems; leave them out"
            )
        model.to(dtype_named(spec.dtype))
        save(model, tokenizer, folder, start)
        stored = _difference(before, _logits(model.float(), rows))
    return Transformed(
        transforms=tuple(transform.model_dump(mode="json") for transform in spec.transforms),
        difference=largest,
        stored_difference=stored,
        tolerance=TOLERANCE,
        tokens=sum(len(row[:_CHECKED_TOKENS]) for row in rows[:_CHECKED_TEXTS]),
        untied=tied and not model.config.tie_word_embeddings,
    )


@torch.no_grad()
def _logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    device = model.get_input_embeddings().weight.device
    cut = [torch.tensor([row[:_CHECKED_TOKENS]], device=device) for row in rows[:_CHECKED_TEXTS]]
    return [model(input_ids=ids, use_cache=False).logits for ids in cut]


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest magnitude; NaN where a logit is."""
    far = torch.stack([(old - new).abs().max() for old, new in zip(before, after, strict=True)]).max()
    return float(far / torch.stack([old.abs().max() for old in before]).max())


def _content(of_start: str, model: Model, texts: Sequence[str]) -> dict[str, object]:
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(levels.__file__)]
    code = b"".join(file.read_bytes() for file in files)
    return {
        "start": of_start,
        "transforms": [transform.model_dump(mode="json") for transform in model.transforms],
        "dtype": model.dtype,
        "texts": digest(list(texts)),
        "code": hashlib.sha256(code).hexdigest()[:12],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
