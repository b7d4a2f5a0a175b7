"""One injection under another deployment or in another format: everything else stays, and there is a way back."""

import pytest

from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.injection import Injection
from fp4rl.spec.retarget import in_format, under_deployment

CONTENT = {
    "mode": "w4a8",
    "by_pattern": {"*.down_proj": "mxfp8"},
    "kv_cache": "mxfp8",
    "targets": {"layers": [0]},
    "errors": [{"kind": "relative"}],
    "seed": 3,
}


def under(deployment, **changes):
    return Injection.model_validate(CONTENT | {"deployment": deployment} | changes)


@pytest.mark.parametrize("deployment", [name for name, each in DEPLOYMENTS.items() if each.kernel.inputs])
def test_another_deployment_changes_the_rules_alone_and_leads_back(deployment):
    found = under_deployment(under("compressed_tensors"), deployment)
    assert found == under(deployment)
    assert under_deployment(found, "compressed_tensors") == under("compressed_tensors")
    assert under_deployment(under(None), deployment) == under(deployment)


def test_another_format_stands_where_linear_layers_are_rounded_under_the_same_deployment():
    found = in_format(under("compressed_tensors"), "mxfp6_e2m3")
    assert found == under("compressed_tensors", mode=None, weight="mxfp6_e2m3", input="mxfp6_e2m3")


def test_a_rule_that_somebody_wrote_is_not_overruled():
    own = Injection.model_validate({"weight": {"name": "mxfp4", "scale_rule": "mse"}})
    with pytest.raises(
        InvalidValueError, match="sets scale_rule 'mse', but deployment 'compressed_tensors' fixes 'even'"
    ):
        under_deployment(own, "compressed_tensors")


def test_what_cannot_be_names_the_cure():
    with pytest.raises(NotFoundError, match="did you mean 'vllm_hopper'"):
        under_deployment(under("ocp"), "vllm_hoper")
    with pytest.raises(NotFoundError, match="did you mean 'mxfp4'"):
        in_format(under("ocp"), "mxfp5")
    with pytest.raises(InvalidValueError, match="rounds no linear layer"):
        in_format(Injection.named("none"), "mxfp4")
