"""`fp4rl new`: write a commented suite for a model folder and a table of questions, both found where you are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fp4rl.cli.options import AsJson
from fp4rl.cli.terminal import console, print_indented, print_json
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.load import check_name, load_spec
from fp4rl.tasks.guess import guessed
from fp4rl.tasks.records import KINDS, kind_of

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")


def command(
    name: Annotated[str, typer.Argument(help="Name of the suite; NAME.yaml is written.")],
    model: Annotated[
        Path | None, typer.Option(help="A model folder; by default the only one here, or in a folder below.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A table of questions and answers; by default the only one here or in data/.")
    ] = None,
    test_path: Annotated[
        Path | None, typer.Option(help="A table of held-out questions; else a tenth of --data is held out.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="Column of the question; guessed by default.")] = None,
    answer: Annotated[str | None, typer.Option(help="Column of the answer; guessed by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a suite that plans and runs at once: two recipes, three seeds, limits measured with the model's tokenizer.

    What is found and guessed is said, and stands in the file with a comment to change it by.

    Example: `fp4rl new my_suite --model models/Qwen2.5-1.5B-Instruct --data qa.csv`
    """
    name = name.removesuffix(".yaml")
    check_name(name, "suite")
    file = Path(f"{name}.yaml")
    if file.exists():
        raise InvalidValueError(f"{file}: is there already; take another name, or delete it")
    folder = model if model is not None else _only("model folder", [*_models()], "--model")
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"--model {folder}: no config.json there; name a Hugging Face model folder on this disk")
    table, test = (data, test_path) if data is not None else _tables(test_path)
    if not table.is_file():
        raise NotFoundError(f"--data {table}: no such file; name a .csv, .jsonl or .parquet")
    keys: dict[str, Any] = {"name": "table", "path": str(table), **guessed(table, question, answer)}
    keys |= {"test_path": str(test)} if test is not None else {}
    quiet()
    from fp4rl.lab.starter import starter

    made = starter(name, folder, keys)
    file.write_text(made.text, encoding="utf-8")
    load_spec(file)
    said = {"file": str(file), "model": str(folder), "chat_template": made.has_template, "task": keys}
    if as_json:
        print_json(said | {"problems": made.sizes})
        return
    screen = console()
    screen.print(f"{file}: written; every line of it says what it is for")
    template = "with a chat template, which is applied" if made.has_template else "without a chat template"
    print_indented(f"model: {folder}, {template}")
    sizes = ", ".join(f"{split} {size}" for split, size in made.sizes.items())
    print_indented(f"data: {table}{f' and {test}' if test else ''}; problems: {sizes}")
    columns = ", ".join(f"{key} = {value}" for key, value in keys.items() if key not in ("name", "path", "test_path"))
    print_indented(f"guessed: {columns}")
    screen.print("next:")
    for words in (f"plan {file} --show-prompt", f"data {file}", f"run {file}", f"report runs/{name}"):
        print_indented(f"fp4rl {words}")


def _models() -> Iterator[Path]:
    for folder in (Path(), *sorted(Path().glob("*/")), *sorted(Path().glob("*/*/"))):
        whole = (folder / "config.json").is_file() and any((folder / file).is_file() for file in _TOKENIZERS)
        if whole and folder.parts[:1] != ("runs",):
            yield folder


def _tables(test_path: Path | None) -> tuple[Path, Path | None]:
    """Return the only table here, and the test file where there are two of which one is called so."""
    kinds = tuple(kind for kind in KINDS if kind != ".json")  # those are settings more often than data
    files = [path for parent in (Path(), Path("data")) for path in sorted(parent.glob("*")) if kind_of(path) in kinds]
    files = [path for path in files if path.is_file() and path != test_path]
    named = [path for path in files if "test" in path.stem.lower()]
    if len(files) == 2 and len(named) == 1 and test_path is None:
        (table,) = (path for path in files if path not in named)
        return table, named[0]
    return _only("table of questions (.csv, .jsonl, .parquet)", files, "--data"), test_path


def _only(what: str, candidates: list[Path], option: str) -> Path:
    if len(candidates) != 1:
        listed = f"{len(candidates)} are here ({', '.join(map(str, candidates[:4]))})" if candidates else "none is here"
        raise NotFoundError(f"which {what}? {listed}; name it with {option}")
    return candidates[0]
