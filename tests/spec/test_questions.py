"""Questions about arms, profiles and keys that are not there are refused when the suite is read."""

import pytest
import yaml

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.load import load_spec

SUITE = {
    "suite": "s",
    "arms": {"bf16": {"evaluation": {"profiles": ["full", "w4a16"], "formats": ["mxfp8"]}}, "w4a16": {}},
    "axes": {"training.steps": [3]},
    "base": {"injection": "w4a16"},
}
FAIR = {"question": "q", "treatment": "w4a16+steps=3@deployment", "control": "bf16+steps=3@w4a16"}


def load(tmp_path, **change):
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(SUITE | {"comparisons": [FAIR | change]}))
    return load_spec(file)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"control": "bf16+steps=3@mxfp8"},
        {"factors": ["injection", "evaluation.profiles", "precision", "injection.weight.block", "model.embedded.seed"]},
        {"factors": ["noise.multipliers.by_layer.0"]},
    ],
)
def test_what_is_there_may_be_asked_about(tmp_path, change):
    assert load(tmp_path, **change).comparisons[0].question == "q"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"control": "bf17+steps=3@full"}, "comparisons.0.control: no arm is called 'bf17.steps=3'; did you mean"),
        ({"control": "bf16+steps=3@w4a4"}, "is not judged as 'w4a4'; did you mean 'w4a16'"),
        ({"control": "bf16+steps=3"}, "a side is written arm@profile; .* is judged as full, w4a16, mxfp8"),
        ({"factors": ["injectoin"]}, "comparisons.0.factors: 'injectoin' is no key; did you mean 'injection'"),
        ({"factors": ["injection.wieght"]}, "'injection.wieght' is no key; did you mean 'weight'"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_name(tmp_path, change, said):
    with pytest.raises(InvalidValueError, match=said):
        load(tmp_path, **change)
