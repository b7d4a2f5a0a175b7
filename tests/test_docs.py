"""What the pages say can be typed: every key goes through the specs, every option is one of its verb.

The kind of fault: a key or an option in a document that no description takes.
"""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

from fp4rl.cli.described import described_by
from fp4rl.cli.main import VERBS, _app
from fp4rl.cli.scan_source import described
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.formats import Format
from fp4rl.spec.keys import described_keys
from fp4rl.spec.load import load_spec, merge, parse
from fp4rl.spec.scan import ScanRequest
from fp4rl.spec.space import Space, load_space

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"),
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "reference"),  # those are generated
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
SECTIONS = ("", *Experiment.model_fields)
# What makes a setting act that would be refused alone, so that the value itself is what is judged.
AROUND = {
    "injection": {"mode": "w4a4", "deployment": "compressed_tensors"},
    "noise": {"schedule": {"kind": "geometric"}},
}
OF_OTHERS = {  # settings of other libraries and of PyTorch that pages speak of
    *("truncation: error", "use_orig_params=True", "fullgraph=True", "FP4RL_BACKEND=reference"),
    *("key=value", "key.path=value"),  # words about settings
    "matmul_noise=0.05",  # the name of a profile
}
REFUSED = {"sigma_end: 0"}  # pages say why it cannot be
# More of a setting that a page shows alone and that means nothing without it.
NEEDS = {
    "moe: all": {},
    "kinds: [linear]": {},
    "opt_in: [lm_head]": {"injection.apply_during": ["rollout", "evaluation"], "model": "folder"},
    "frozen_base: packed": {"injection.apply_during": ["rollout", "training", "evaluation", "reference"]},
    "coarse: {columns: 128, choice: search}": {"injection.weight.name": "mxfp4", "injection.mode": None},
    "chat: false": {"task": {"name": "gsm8k", "path": "train.jsonl"}},
    "rotation: 32": {"injection.weight.name": "mxfp4"},
    "fallback: 0.25": {"injection.input.name": "mxfp4", "injection.deployment": None},
    **{
        setting: {"injection.weight.name": "mxfp4", "injection.mode": None, "injection.deployment": None}
        for setting in (
            *("scale_math: tensor", "scale_math: float32", "scale_epsilon: 9.6e-7", "scale_rule: rceil"),
            *("scale_rule: even", "rounding: half_toward_zero", "rounding: half_added"),
        )
    },
}


def spans(text):
    """Inline code, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def blocks(text, *kinds):
    return [body for kind, body in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if kind in kinds]


def loads(content, place):
    """What is wrong with an experiment or a suite; None where it loads."""
    file = place / "page.yaml"
    file.write_text(yaml.safe_dump(content))
    try:
        load_space(file) if "search" in content else load_spec(file)
    except InvalidValueError as error:
        return str(error)
    return None


YAML_BLOCKS = [(name, body) for name, text in TEXTS.items() for body in blocks(text, "yaml")]
SETTINGS = sorted(
    {
        span
        for text in TEXTS.values()
        for span in spans(text)
        if re.fullmatch(r"[a-z][\w.]*: (\S+|[\[{].*[\]}])", span) or re.match(r"[a-zA-Z][\w.]*=[^+\s]\S*$", span)
    }
    - OF_OTHERS
)
PATHS = sorted(
    {span for text in TEXTS.values() for span in spans(text) if re.fullmatch(r"[a-z]+(\.[a-z_]+)+", span)}
    - {f"{name}.md" for name in Experiment.model_fields}
)


def test_the_reference_pages_are_up_to_date():
    checked = subprocess.run(
        [sys.executable, "tools/reference.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_pages_hold_something_to_try():
    assert len(YAML_BLOCKS) >= 5
    assert len(SETTINGS) >= 15
    assert len(PATHS) >= 5


@pytest.mark.parametrize(("page", "body"), YAML_BLOCKS, ids=[f"{p}-{i}" for i, (p, _) in enumerate(YAML_BLOCKS)])
def test_every_yaml_block_is_a_spec_or_a_part_of_one(page, body, tmp_path):
    content = yaml.safe_load(body)
    wrong = {}
    for section in SECTIONS:
        here = {section: content} if section else content
        wrong[section] = loads(here, tmp_path)
        if wrong[section] is None:
            return
    pytest.fail(f"{page}: no part of a spec takes this block: {wrong['']}\n{body}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_named_on_a_page_is_taken(setting, tmp_path):
    key, value = re.split(r": |=", setting, maxsplit=1)
    paths = [k.path for k in described_keys(Experiment) if f".{k.path}".endswith(f".{key}")]
    paths += [f"{p}.{key}" for p in ("injection.weight", "injection.input") if key in {f.name for f in fields(Format)}]
    if key in Suite.model_fields or key in Space.model_fields:
        return
    if key.partition(".")[0] in ScanRequest.model_fields:
        parse(ScanRequest, merge({}, {key: yaml.safe_load(value)}), "")
        return
    assert paths, f"no key of a spec is called {key!r}"
    wrong = [_wrong(path, yaml.safe_load(value), NEEDS.get(setting, {}), tmp_path) for path in paths]
    if setting in REFUSED:
        assert None not in wrong
    else:
        assert None in wrong, wrong[0]


def _wrong(path, value, more, place):
    around = AROUND if path.partition(".")[0] in AROUND else {}
    return loads(merge(merge(merge({}, around), more), {path: value}), place)


@pytest.mark.parametrize("path", [p for p in PATHS if p.partition(".")[0] in Experiment.model_fields])
def test_every_dotted_key_named_on_a_page_is_one(path):
    modules = (ROOT / "src" / "fp4rl" / path.partition(".")[0]).is_dir() and path.count(".") > 0
    known = {key.path for key in described_keys(Experiment)}
    parts = path.split(".")
    module = ROOT.joinpath("src", "fp4rl", *parts[:2]).with_suffix(".py")
    assert path in known or (modules and module.is_file()), f"{path} is no key of a spec"


COMMANDS = sorted(
    {
        line.strip().removeprefix("$ ").partition("  #")[0]
        for text in TEXTS.values()
        for line in [*spans(text), *(line for b in blocks(text, "", "console") for line in b.splitlines())]
        if re.match(r"(\$ )?fp4rl \w+", line.strip())
    }
)


@cache
def _verb(name):
    found = typer.main.get_command(_app(name))
    return found.commands.get(name, found) if hasattr(found, "commands") else found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_on_a_page_has_the_verb_and_the_options_it_names(command):
    _, verb, *words = shlex.split(command)
    assert verb in VERBS
    found = _verb(verb)
    if words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words[0]]
    known = {name for param in found.params for name in (*param.opts, *param.secondary_opts)}
    for word in words:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in {*known, "--help"}, f"{word} is no option of fp4rl {verb}"


OVERRIDES = [
    (command, word)
    for command in COMMANDS
    if re.match(r"fp4rl (plan|run|sites|scan|schedule|quickstart) ", command)
    for word in shlex.split(command)[2:]
    if re.match(r"[a-z][\w.]*=[^+]", word)
]


@pytest.mark.parametrize(("command", "word"), OVERRIDES, ids=[word for _, word in OVERRIDES])
def test_every_override_on_a_page_changes_a_suite(command, word):
    def said(*words):
        if command.startswith("fp4rl scan "):
            found = described("catalogue/quickstart", words)
            return found.experiment, found.request
        return described_by(Path("catalogue/quickstart"), words)

    assert said(word) != said()


CODE = ("src", "tests", "benchmarks", "examples")
FOREIGN = {"round_mode", "scale_alg", "dst_type_max", "rollout_func", "my_suite"}  # CANN's, TRL's, a reader's own


@cache
def _words_of_the_code():
    files = [file for folder in CODE for kind in ("*.py", "*.yaml") for file in (ROOT / folder).rglob(kind)]
    words = {word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
    return words | {file.stem for file in files}


@pytest.mark.parametrize("page", TEXTS)
def test_every_name_with_an_underscore_on_a_page_is_one_that_the_code_knows(page):
    """A name that was changed in the code and stayed on the page."""
    names = {word for span in spans(TEXTS[page]) for word in re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", span)}
    assert names - _words_of_the_code() - FOREIGN == set()


RESULTS = ROOT / "benchmarks" / "results"
AIM = re.compile(r"(\d+\.\d+) ?(?:times that )?(?:\([^)|]*\), |\()aim (\d+\.\d+)")
MISSED = [
    (file.stem, measured)
    for file in sorted(RESULTS.glob("*.md"))
    for measured, aim in AIM.findall(file.read_text(encoding="utf-8"))
    if float(measured) > float(aim)
]


def test_tables_hold_aims():
    assert sum(len(AIM.findall(file.read_text(encoding="utf-8"))) for file in RESULTS.glob("*.md")) >= 4


@pytest.mark.parametrize(("table", "measured"), MISSED)
def test_an_aim_that_a_table_misses_is_called_missed_where_it_is_quoted(table, measured):
    """The kind: a figure that is rounded on its way into a page until it reads as met (1.033 as 1.02, the aim 1.03)."""
    said = [
        paragraph
        for name, text in TEXTS.items()
        if name.startswith("docs")
        for paragraph in text.split("\n\n")
        if re.search(rf"(?<!\d){measured}(?!\d)", paragraph)
    ]
    assert said, f"no page quotes {measured} of {table}.md as it was measured"
    assert all("missed" in paragraph for paragraph in said)
