"""`fp4rl scan --calibrate`: a static factor for every input under NVFP4 or FP8, as a file that a run takes."""

from collections import defaultdict

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.cli.described import runs_of
from fp4rl.cli.main import main
from fp4rl.diagnose.calibration import from_tokens
from fp4rl.diagnose.static_factors import static_factors
from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import NVFP4
from fp4rl.spec.injection import Injection

TEXTS = [[5, 9, 3, 7], [4, 8], [6, 6, 2, 9, 11, 3], [3, 4]]
MIXED = {"mode": "nvfp4_w4a4", "by_pattern": {"*.down_proj": {"weight": "mxfp8"}, "*.o_proj": {"input": "mxfp4"}}}


@pytest.fixture(scope="module")
def mixture():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "vocab_size": 50, "head_dim": 16}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes)).eval()


def seen_by_hooks(model):
    """Text by text: the largest magnitude of each linear layer's input, and of what each block hands to its experts."""
    largest = defaultdict(float)

    def hook(name):
        def see(_module, args):
            largest[name] = max(largest[name], args[0].bfloat16().abs().max().item())

        return see

    layers = {n: m for n, m in model.named_modules() if n.endswith(("_proj", ".experts"))}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([text]))
    for handle in handles:
        handle.remove()
    return largest


def test_the_factor_of_a_site_is_the_largest_input_that_any_text_gave_it(mixture):
    described = Injection.model_validate({**MIXED, "targets": {"leave": ["*.gate"]}})
    fragment = static_factors(mixture, resolve(mixture, described), from_tokens(TEXTS, batch_size=2))
    table = resolve(mixture, Injection.model_validate(fragment["injection"]))
    wanted = seen_by_hooks(mixture)
    assert len(table.plans) == len(resolve(mixture, described).plans) == 12
    for plan, before in zip(table.plans, resolve(mixture, described).plans, strict=True):
        assert (plan.weight, plan.output) == (before.weight, before.output)
        if plan.name.endswith("o_proj"):
            assert plan.input == before.input
            continue
        assert plan.input is not None
        assert (plan.input.name, plan.input.factor) == ("nvfp4", "static")
        name = plan.name.removesuffix(".gate_up_proj")
        if not plan.name.endswith("experts.down_proj"):  # its input is made inside
            assert plan.input.calibrated == wanted[name] > 0
    assert {plan.input.calibrated for plan in table.plans if plan.name.startswith("model.layers.0.self_attn.q")} == {
        plan.input.calibrated for plan in table.plans if plan.name.startswith("model.layers.0.self_attn.v")
    }


def test_an_attachment_rounds_by_the_factors_of_the_file(mixture):
    table = resolve(mixture, Injection.named("nvfp4_w4a4"))
    fragment = static_factors(mixture, table, from_tokens(TEXTS))
    name = "model.layers.1.self_attn.o_proj"
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    with attach(mixture, Injection.model_validate(fragment["injection"])) as attachment, torch.no_grad():
        calibrated = attachment.states[name].plan.input.calibrated
        whole = torch.cat((x, torch.full((1, 64), calibrated)))  # a tensor whose own factor is the static one
        y = mixture.get_submodule(name)(x)
        weight = fake_quantize(mixture.get_parameter(f"{name}.weight").bfloat16(), NVFP4).float()
    assert torch.equal(y, fake_quantize(whole.bfloat16(), NVFP4).float()[:3] @ weight.T)


def test_an_injection_without_such_inputs_is_refused(mixture):
    with pytest.raises(InvalidValueError, match="scan injection=nvfp4_w4a4"):
        static_factors(mixture, resolve(mixture, Injection.named("w4a4")), from_tokens(TEXTS))


def test_a_suite_runs_with_the_file_of_a_scan(tmp_path, capsys):
    from fp4rl.models.tiny import build
    from fp4rl.spec.model import Embedded

    tokenizer, folder, factors = build_tokenizer(), tmp_path / "model", tmp_path / "factors.yaml"
    build(Embedded(seed=3), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = ["injection=nvfp4_w4a4", "parts=precision", "texts=4", "--calibrate", str(factors)]
    assert main(["scan", str(folder), *words]) == 0
    assert f"static factors: {factors}" in capsys.readouterr().out.replace("\n", "")
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump({"model": {"path": str(folder)}, "injection": "nvfp4_w4a4"}))
    (run,) = runs_of(spec, [f"+{factors}"])
    (plain,) = runs_of(spec, [])
    assert len(run.experiment.injection.by_pattern) == 14
    assert run.run_id != plain.run_id
    assert main(["scan", str(folder), "weights_only=true", "--calibrate", str(factors)]) == 2
    assert "--calibrate needs the model" in capsys.readouterr().err
