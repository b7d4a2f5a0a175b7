"""Whatever stands in a suite's file or beside it on the command line, `plan` answers with 0, or with 2 and one line."""

import io
from contextlib import redirect_stderr, redirect_stdout

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fp4rl.cli.main import main
from fp4rl.lab.catalogue import entry, files
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.keys import described_keys
from fp4rl.spec.load import load_spec
from planted.damage import changed, damage, odd

pytestmark = pytest.mark.fuzz

SUITE = {
    "suite": "s",
    "seeds": [0, 1],
    "base": Experiment.model_validate(
        {"noise": {}, "injection": {"mode": "w4a4", "by_pattern": {"*.o_proj": "mxfp8"}, "errors": [{"scale": 0.1}]}}
    ).model_dump(mode="json", exclude={"seed"}),
    "arms": {
        "a": {},
        "b": {"injection": "w4a16", "noise": "none"},
        "c": {"training.lr": 0.1, "evaluation": {"count": 9}},
    },
    "axes": {"training.steps": [3, 4]},
    "comparisons": [
        {"question": "q", "treatment": "a+steps=3@full", "control": "b+steps=3@full", "factors": ["injection"]},
        {"question": "r", "treatment": "c+steps=4@full", "control": "b+steps=3@full", "test": "reaches", "margin": 0.1},
    ],
}
LONE = {**SUITE["base"], "task": {"name": "gsm8k", "path": "x.jsonl"}, "model": {"path": "m", "lora": {}}}
TEXTS = [entry(name).path.read_bytes() for name in files()] + [
    yaml.safe_dump(SUITE).encode(),
    b"a: &a [*a]\nb: *a\n? [x]\n: !!set {y}\n",
]
KEYS = [key.path for key in described_keys(Experiment)] + [
    "arms",
    "axes",
    "seeds",
    "suite",
    "arms.a",
    "axes.training.lr",
]
WORDS = st.one_of(
    st.tuples(st.sampled_from(KEYS), odd).map(
        lambda pair: f"{pair[0]}={yaml.safe_dump(pair[1], default_flow_style=True)}"
    ),
    st.tuples(st.sampled_from(KEYS), st.text(max_size=9)).map("=".join),
    st.text(max_size=9),
)


def answered(arguments) -> int:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    said = [line for line in err.getvalue().splitlines() if line.startswith("fp4rl: ")]
    assert code in (0, 2), err.getvalue()
    assert len(said) == (code == 2), err.getvalue()
    assert "Traceback" not in err.getvalue()
    assert all(len(line) < 2000 for line in said), said
    return code


def planned(folder, content: bytes, words=()) -> None:
    file = folder / "s.yaml"
    file.write_bytes(content)
    code = answered(
        ["plan", str(file), *(word for word in words if not word.startswith("-")), "--runs", str(folder / "runs")]
    )
    if code == 0:  # what one verb understands the others do
        assert answered(["plan", str(file), "--json", *(word for word in words if not word.startswith("-"))]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["s.yaml"], "a plan writes nothing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("suites")


def test_the_suites_that_are_changed_are_right_to_begin_with(folder):
    for text in TEXTS[:-1]:
        planned(folder, text)
    (folder / "s.yaml").write_text(yaml.safe_dump(LONE))
    assert load_spec(folder / "s.yaml").task.path == "x.jsonl"


@given(st.data())
def test_a_suite_with_other_values_keys_and_shapes(folder, data):
    content = data.draw(changed(data.draw(st.sampled_from([SUITE, LONE]))))
    planned(folder, yaml.dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(st.data())
def test_a_suite_whose_text_is_damaged(folder, data):
    planned(folder, data.draw(damage(data.draw(st.sampled_from(TEXTS)))))


@given(st.lists(WORDS, min_size=1, max_size=3))
def test_words_on_the_command_line(folder, words):
    planned(folder, yaml.safe_dump(SUITE).encode(), words)
