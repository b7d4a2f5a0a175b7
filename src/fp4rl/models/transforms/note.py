"""What stands beside a model that was transformed; read without torch."""

from pathlib import Path

from fp4rl.spec.transforms import Transformed

NOTE = ".transforms.json"  # hidden: it is no part of the model, nor of its digest


def note_of(folder: Path) -> Transformed | None:
    """Return what was done to the start model in a folder; None where nothing was."""
    file = folder / NOTE
    return Transformed.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None
