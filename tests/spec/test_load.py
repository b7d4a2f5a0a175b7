"""The door: YAML and words in, validated descriptions out, and errors that name file, key and cure."""

from itertools import pairwise

import pytest
import yaml

from fp4rl.lab.catalogue import entry, files
from fp4rl.lab.matrix import planned
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import arm_contents, load_spec, merge, parse, read_yaml


def written(tmp_path, content):
    file = tmp_path / "spec.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_an_unknown_key_is_named_with_the_file_and_the_nearest_key(tmp_path):
    file = written(tmp_path, {"training": {"clip_ratio_hihg": 0.3}})
    with pytest.raises(
        InvalidValueError, match=r"spec\.yaml: unknown key 'training\.clip_ratio_hihg'; did you mean 'clip_rati"
    ):
        load_spec(file)


def test_an_unknown_key_inside_a_union_is_named_with_the_keys_of_that_place(tmp_path):
    file = written(tmp_path, {"task": {"name": "gsm8k", "path": "x.jsonl", "promt": "{question}"}})
    with pytest.raises(InvalidValueError, match="did you mean 'prompt'"):
        load_spec(file)


def test_an_unknown_key_in_one_arm_names_the_arm(tmp_path):
    file = written(tmp_path, {"suite": "s", "arms": {"a": {}, "b": {"nosie": {}}}})
    with pytest.raises(InvalidValueError, match=r"arm b: unknown key 'nosie'; did you mean 'noise'"):
        load_spec(file)


def test_an_unknown_key_in_the_base_names_the_file_and_the_base_and_no_arm(tmp_path):
    file = written(tmp_path, {"suite": "s", "base": {"training": {"stpes": 3}}, "arms": {"a": {}, "b": {"noise": {}}}})
    with pytest.raises(InvalidValueError, match=r"spec\.yaml: base: unknown key 'training\.stpes'"):
        load_spec(file)


def test_a_wrong_word_of_the_command_line_is_named_and_a_right_one_beside_it_is_not(tmp_path):
    file = written(tmp_path, {"suite": "s", "arms": {"a": {}}})
    with pytest.raises(InvalidValueError, match=r"spec\.yaml with 'training\.stpes=3': base: unknown key") as error:
        load_spec(file, ["training.lr=0.1", "training.stpes=3", "seeds=[1]"])
    assert "training.lr" not in str(error.value)


def test_a_mistake_of_the_file_is_not_blamed_on_a_word_of_the_command_line(tmp_path):
    with pytest.raises(InvalidValueError, match=r"spec\.yaml: unknown key 'trainig'"):
        load_spec(written(tmp_path, {"trainig": {}}), ["training.lr=0.1"])


def test_a_misspelled_arms_is_named_and_not_taken_for_an_experiment(tmp_path):
    with pytest.raises(InvalidValueError, match=r"unknown key 'armz'; did you mean 'arms'\?"):
        load_spec(written(tmp_path, {"suite": "s", "armz": {"a": {}}}))


def test_an_override_changes_the_base_of_a_suite_and_the_suites_own_keys(tmp_path):
    file = written(tmp_path, {"suite": "s", "base": {"training": {"steps": 9}}, "arms": {"a": {}}})
    suite = load_spec(file, ["training.steps=3", "seeds=[4, 5]"])
    assert [(r.seed, r.experiment.training.steps) for r in planned(suite)] == [(4, 3), (5, 3)]


def test_a_fragment_is_laid_over_the_file(tmp_path):
    file = written(tmp_path, {"training": {"steps": 9, "lr": 0.1}})
    fragment = tmp_path / "more.yaml"
    fragment.write_text("training: {steps: 2}\n")
    assert load_spec(file, [f"+{fragment}"]).training.steps == 2
    assert load_spec(file, [f"+{fragment}"]).training.lr == 0.1


def test_a_fragment_can_be_laid_over_one_arm(tmp_path):
    spec, advice = tmp_path / "s.yaml", tmp_path / "advice.yaml"
    spec.write_text("suite: s\narms: {bf16: {}, w4a16: {injection: {mode: w4a16}}}\n")
    advice.write_text("injection: {mode: w4a16, by_pattern: {'*.o_proj': mxfp8}}\n")
    arms = dict(arm_contents(load_spec(spec, [f"arms.w4a16=+{advice}"])))
    assert arms["bf16"].injection is None
    assert arms["w4a16"].injection.by_pattern


def test_two_arms_that_an_override_makes_one_are_refused(tmp_path):
    spec, advice = tmp_path / "s.yaml", tmp_path / "advice.yaml"
    spec.write_text("suite: s\narms: {bf16: {}, w4a16: {injection: {mode: w4a16}}}\n")
    advice.write_text("injection: {mode: w4a16}\n")
    with pytest.raises(
        InvalidValueError, match=r"arms bf16 and w4a16 describe the same experiment.*arms.NAME=\+file.yaml"
    ):
        load_spec(spec, [f"+{advice}"])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("base: {seed: 7}\narms: {a: {}}", "base.seed"),
        ("arms: {a: {seed: 5}}", "arms.a.seed"),
        ("axes: {seed: [1, 2]}\narms: {a: {}}", "axes.seed"),
    ],
)
def test_a_seed_inside_a_suite_is_refused_since_its_own_seeds_would_replace_it(tmp_path, content, part):
    spec = tmp_path / "s.yaml"
    spec.write_text(f"suite: s\n{content}\n")
    with pytest.raises(InvalidValueError, match=f"{part}: .*`seeds`"):
        load_spec(spec)


@pytest.mark.parametrize("word", ["training.steps", "=3", "training.steps=[1"])
def test_a_malformed_override_is_refused(tmp_path, word):
    with pytest.raises(InvalidValueError):
        load_spec(written(tmp_path, {}), [word])


def test_a_missing_file_and_broken_yaml_are_named(tmp_path):
    with pytest.raises(NotFoundError, match="no such file"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(InvalidValueError, match=r"line 3.*not valid YAML"):
        load_spec(written(tmp_path, "a: 1\nb: [1\nc: 2"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"noise": {"schedule": {"sigma_end": 0}}}, "sigma_end"),
        ({"noise": {"schedule": {"num_stages": 2}}}, "num_stages"),
        ({"injection": {"weight": "mxfp5"}}, "did you mean"),
        ({"injection": "w4a15"}, "w4a16"),
        ({"training": {"mini_batch_size": 7}}, "not a multiple"),
        ({"training": {"micro_batch_size": 7}}, "does not divide"),
        ({"training": {"overlong_buffer": {"len": 48}}}, "below max_response_length"),
        ({"model": {"path": "x", "embedded": {}}}, "either `path` or `embedded`"),
        ({"injection": {"weight": "mxfp5"}}, "'mxfp4' or 'mxfp8'"),
        ({"training": {"steps": "fast"}}, "training.steps: expected a whole number, found 'fast'"),
        ({"training": {"steps": 0}}, "training.steps: expected a number greater than 0, found 0"),
        ({"training": {"lr": "fast"}}, "training.lr: expected a number, found 'fast'"),
        ({"training": None}, "training: expected keys and values, found nothing"),
        ({"training": {"mask_truncated": "perhaps"}}, "expected true or false"),
        ({"evaluation": {"profiles": []}}, "evaluation.profiles: is empty; name at least one"),
        ({"task": {"name": "gsm9k"}}, "task.name: 'gsm9k' is not known; did you mean 'gsm8k'?"),
        ({"task": {"name": "gsm8k"}}, "task.path: this key is required"),
        ({"task": {"path": "x"}}, "task.name: this key is required"),
        ("", "expected keys and values, found nothing: the file is empty"),
        ("[1]", "found a list"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_cure(tmp_path, content, part):
    with pytest.raises(InvalidValueError) as error:
        load_spec(written(tmp_path, content))
    assert part in str(error.value)
    assert "\n" not in str(error.value)


# What a hand, or a program, can write and no description means. Each with what its line must name.
ODD = [
    ("training: {steps: 3}\ntraining: {steps: 4}", "line 2: the key 'training' stands here twice"),
    ("training: {steps: 3, lr: 0.1, steps: 4}", "'steps' stands here twice"),
    ("training: &a {steps: *a}", "alias *a stands inside"),
    ("[" * 5000, "nested deeper than"),
    ("a: " + "{b: " * 5000, "nested deeper than"),
    (
        "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in pairwise("abcdefghi")),
        "100,000",
    ),
    ("training: {steps: !!int abc}", "does not fit"),
    ("training: !!python/object:os.system 1", "!!python/object:os.system have no place"),
    ("? [a]\n: b", "a key is a single word"),
    ("training: {steps: true}", "training.steps: expected a number, found true"),
    (
        "noise: {multipliers: {by_layer: {1: 1.0, 0: true}}}",
        "noise.multipliers.by_layer.0: expected a number, found true",
    ),
    ("'tra[ining': {}", "unknown key 'tra[ining'"),
    ("'[/think]': {}", "unknown key '[/think]'"),
    ("training: {'[x]': 3}", "unknown key 'training.[x]'"),
    ("injection: {mode: {name: w4a4}}", "no mode is called {'name': 'w4a4'}"),
    ("injection: {mode: [w4a4]}", "no mode is called ['w4a4']"),
    ("evaluation: {profiles: [w4a17]}", "no profile is called 'w4a17'; did you mean 'w4a16'"),
    ("evaluation: {profiles: [matmul_noise=much]}", "write a number such as matmul_noise=0.05"),
    ("evaluation: {formats: [mxfp5]}", "no profile is called 'mxfp5'"),
    ("suite: s\narms: {a: {}}\naxes: {training.lr: []}", "axes.training.lr: is empty"),
    ("suite: s\narms: {a: {}}\naxes: {training.lr: [0.1, 0.2, 0.1]}", "an axis holds the same value twice"),
    ("suite: s\narms: {a: {}}\naxes: {training.steps: [1, 1.0]}", "describe the same experiment"),
    ("suite: s\narms: {" + "a" * 400 + ": {}}", "400 letters is too long"),
    ("suite: " + "s" * 400 + "\narms: {a: {}}", "suite: is 400 letters long; 150 fit"),
    ("suite: a b\narms: {a: {}}", "'a b' is no name: write letters"),
    ("suite: s\narms: {ä: {}}", "arm 'ä': a name is letters"),
    ("suite: s\narms: {a: {}}\naxes: {model.path: [models/x]}", "of an axis with other values make arms"),
]


@pytest.mark.parametrize(("text", "part"), ODD, ids=range(len(ODD)))
def test_odd_yaml_and_odd_values_are_one_line(tmp_path, text, part):
    """Kind: what a file can hold and a description cannot, from YAML's own corners to values of another sort."""
    with pytest.raises(InvalidValueError) as error:
        load_spec(written(tmp_path, text))
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_comparison_of_a_side_with_itself_is_refused(tmp_path):
    text = "suite: s\narms: {a: {}, b: {noise: {}}}\ncomparisons: [{question: q, treatment: b@full, control: b@full}]"
    with pytest.raises(InvalidValueError, match=r"comparisons\.0: b@full is compared with itself"):
        load_spec(written(tmp_path, text))


def test_merge_keys_aliases_and_dates_still_mean_what_they_mean(tmp_path):
    file = written(tmp_path, "base: &b {steps: 3, lr: 0.1}\nmore: {<<: *b, steps: 4}\nday: 2026-01-31\n")
    assert read_yaml(file) == {"base": {"steps": 3, "lr": 0.1}, "more": {"steps": 4, "lr": 0.1}, "day": "2026-01-31"}


def test_a_byte_order_mark_is_read_over(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_bytes(b"\xef\xbb\xbftraining: {steps: 3}\n")
    assert load_spec(file).training.steps == 3


@pytest.mark.parametrize("word", ["training={steps: 3, steps: 4}", "training.steps=!!int x", "training=" + "[" * 999])
def test_an_override_is_read_as_strictly_as_a_file(tmp_path, word):
    with pytest.raises(InvalidValueError) as error:
        load_spec(written(tmp_path, {}), [word])
    assert len(str(error.value)) < 250


def test_merge_lays_dotted_paths_over_nested_keys_and_leaves_its_arguments_alone():
    base = {"a": {"b": 1, "c": 2}}
    assert merge(base, {"a.b": 3}) == {"a": {"b": 3, "c": 2}}
    assert merge(base, {"a": "none"}) == {"a": "none"}
    assert base == {"a": {"b": 1, "c": 2}}


LAYER = {"layers": [0]}
ROTATED = {"name": "nvfp4", "rotation": 32}
COSINE = {"kind": "cosine", "sigma_start": 0.3}


@pytest.mark.parametrize(
    ("content", "override", "wanted"),
    [
        (
            "injection: w4a4",
            "injection.deployment=compressed_tensors",
            {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}},
        ),
        ("injection: w4a4", "injection={targets: {layers: [0]}}", {"injection": {"mode": "w4a4", "targets": LAYER}}),
        ("injection: {weight: nvfp4}", "injection.weight.rotation=32", {"injection": {"weight": ROTATED}}),
        ("model: folder", "model.dtype=bfloat16", {"model": {"path": "folder", "dtype": "bfloat16"}}),
        ("model: embedded", "model.dtype=bfloat16", {"model": {"embedded": {}, "dtype": "bfloat16"}}),
        ("noise: {schedule: cosine}", "noise.schedule.sigma_start=0.3", {"noise": {"schedule": COSINE}}),
        ("injection: none", "injection.mode=w4a16", {"injection": "w4a16"}),
        ("injection: w4a4", "injection=none", {}),
        ("injection: w4a4", "injection.mode=w4a16", {"injection": "w4a16"}),
    ],
)
def test_a_key_laid_over_a_short_form_keeps_what_that_stands_for(tmp_path, content, override, wanted):
    """The kind: a setting that silently throws away its neighbours (a model's path, the whole injection)."""
    file = tmp_path / "spec.yaml"
    file.write_text(content)
    assert load_spec(file, [override]) == Experiment.model_validate(wanted)


@pytest.mark.parametrize("change", [{"by_layer": {0: 3.0}}, {"by_layer": {"0": 3.0}}, {"by_layer.0": 3.0}])
def test_merge_knows_a_layer_by_its_number_however_it_is_written(change):
    assert merge({"by_layer": {0: 1.0, 1: 2.0}}, change) == {"by_layer": {0: 3.0, 1: 2.0}}


def test_a_described_experiment_survives_yaml_and_keeps_its_digest():
    for name in files():
        suite = load_spec(entry(name).path)
        assert isinstance(suite, Suite)
        for run in planned(suite):
            again = Experiment.model_validate(yaml.safe_load(yaml.safe_dump(run.experiment.model_dump(mode="json"))))
            assert again == run.experiment
            assert digest(again) == run.spec_digest


def test_the_digest_tells_seeds_and_arms_apart():
    runs = planned(load_spec(entry("quickstart").path))
    assert len({run.spec_digest for run in runs}) == len(runs) == 12


def test_axes_cross_the_arms(tmp_path):
    file = written(
        tmp_path,
        {
            "suite": "s",
            "arms": {"a": {}, "b": {"training": {"steps": 3}}},
            "axes": {"training.lr": [0.1, 0.2]},
            "seeds": [0],
        },
    )
    assert [run.arm for run in planned(load_spec(file))] == ["a+lr=0.1", "a+lr=0.2", "b+lr=0.1", "b+lr=0.2"]


def test_values_that_conflict_are_named_by_the_key_as_it_is_written():
    with pytest.raises(InvalidValueError, match=r"^x: noise\.schedule\.sigma_end: .* never reaches zero"):
        parse(Experiment, {"noise": {"schedule": {"kind": "geometric", "sigma_end": 0}}}, "x")
    with pytest.raises(InvalidValueError, match=r"^x: evaluation\.deployment: .* did you mean 'ocp'"):
        parse(Experiment, {"evaluation": {"deployment": "ocpp"}}, "x")
