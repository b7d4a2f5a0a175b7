"""Measures of error that mislead: a large one without harm, a small one with it, and the KL that tells them apart."""

import copy

import pytest
import torch

from fp4rl.diagnose.calibration import from_tokens
from fp4rl.diagnose.findings import findings, rule_results
from fp4rl.diagnose.scan import scan
from fp4rl.spec.injection import Injection
from fp4rl.spec.scan import Scan

BLOCK = 32
# By hand, in units of a block's scale, which its one large value sets: 4 on the grid of E2M1, whose next values are 3
# and 6; below .25 all becomes 0. Under `floor` 7.9 has the scale of 4, and is clipped to 6.
SITES = {
    "model.layers.1.self_attn.o_proj": (4.0, 0.02),  # 31 of 32 values become 0, and matter to nobody
    "model.layers.2.self_attn.o_proj": (6.02, 6.02),  # every value is clipped, by 0.3 %
    "model.layers.3.self_attn.o_proj": (7.9, 1.0),  # one value of 32 is clipped, by 24 %
}
SMALL, CLIPPED, HARMFUL = SITES


@pytest.fixture(scope="module")
def scanned(trained, tokens):
    model = copy.deepcopy(trained)
    signs = torch.Generator().manual_seed(0)
    for name, (one, others) in SITES.items():
        weight = model.get_submodule(name).weight
        values = torch.full_like(weight, others)
        values[:, ::BLOCK] = one
        values *= torch.randint(0, 2, weight.shape, generator=signs) * 2 - 1
        weight.data.copy_(values * 2.0**-6)
    injection = Injection(weight="mxfp4", targets={"take": list(SITES)}, dtype="float32")
    spec = Scan(parts=("precision", "sensitivity"))
    return scan(model, injection, texts=from_tokens(tokens[:8]), spec=spec)


@pytest.mark.parametrize(
    ("rule", "measure", "by_hand"),
    [
        ("relative_error", "mean_relative", {SMALL: 31 / 32, CLIPPED: 0.02 / 6.02, HARMFUL: 1.9 / 7.9 / 32}),
        ("deadzone", "deadzone_share", {SMALL: 31 / 32, CLIPPED: 0.0, HARMFUL: 0.0}),
        ("saturation", "clipped_share", {SMALL: 0.0, CLIPPED: 1.0, HARMFUL: 1 / 32}),
    ],
)
def test_a_count_or_a_mean_of_ratios_names_another_weight_than_the_one_that_harms(scanned, rule, measure, by_hand):
    """The planted defect: read as damage, each of these names another weight than the one that does the damage."""
    told = {part.site: part.measures[measure] for part in scanned.parts if part.part == "weight"}
    assert told == pytest.approx(by_hand, rel=1e-3)
    assert max(told, key=told.get) != HARMFUL
    kl = {site.name: site.kl for site in scanned.sensitivity.sites}
    assert kl[HARMFUL] > 10 * max(kl[SMALL], kl[CLIPPED])
    if rule != "saturation":
        (judged,) = (result for result in rule_results(scanned) if result.rule.name == rule)
        assert [name.partition(" ")[0] for name in judged.flagged] == [SMALL]


def test_the_scan_names_the_weight_that_harms_and_says_that_size_does_not_tell(scanned):
    said = {finding.text: finding.sites for finding in findings(scanned) if finding.kind == "sensitivity"}
    (worst,) = (sites for text, sites in said.items() if "of the KL; the worst is" in text)
    assert worst == (HARMFUL,)
