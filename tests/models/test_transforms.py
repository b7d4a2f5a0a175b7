"""Transforms of the start model: its function stays, its tensors become those of the papers."""

import copy

import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import kurtosis
from torch.nn.functional import rms_norm
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.models.transforms import start as start_room
from fp4rl.models.transforms.note import note_of
from fp4rl.models.transforms.rotate import Rotation
from fp4rl.models.transforms.start import apply, transformed
from fp4rl.sites.observe import observe
from fp4rl.sites.walk import walk
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.model import Embedded, Model

SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 24}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {"qwen2": True, "llama": False, "qwen3": True, "mistral": False}  # whether the head is tied
ROWS = [list(range(3, 40)), list(range(60, 99))]
RESIDUAL, HEADS, SMOOTH = {"name": "rotate_residual", "seed": 3}, {"name": "rotate_heads"}, {"name": "smooth"}
DONE = {"residual": [RESIDUAL], "heads": [HEADS], "smooth": [SMOOTH], "all": [RESIDUAL, HEADS, SMOOTH]}
TEXTS = ["Q: Tom has 2 3 coins . loses 2 . How many ? A: 2 1", "Q: Amy has 4 coins . How many ? A: 4"]


def random_model(family, tied=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model.to(dtype).eval()


def transformers_norms_by_torch(model):
    """transformers computes norms in float32 whatever the model's dtype is; torch's own in float64."""
    for norm in model.modules():
        if "Norm" in type(norm).__name__:
            norm.forward = lambda x, own=norm: rms_norm(x, x.shape[-1:], own.weight, own.variance_epsilon)
    return model


@torch.no_grad()
def logits(model):
    return torch.stack([model(torch.tensor([row[:30]])).logits for row in ROWS])


def apart(before, after):
    return float((before - after).abs().max() / before.abs().max())


def done(model, transforms):
    apply(model, Model(transforms=transforms).transforms, ROWS)
    return model


@pytest.mark.parametrize(("family", "tied"), FAMILIES.items())
@pytest.mark.parametrize("transforms", DONE.values(), ids=DONE)
def test_no_logit_changes(family, tied, transforms):
    single = random_model(family, tied)
    assert apart(logits(single), logits(done(copy.deepcopy(single), transforms))) < 1e-5
    double = random_model(family, tied, torch.float64)
    before = {name: weight.clone() for name, weight in double.state_dict().items()}
    expected = logits(transformers_norms_by_torch(copy.deepcopy(double)))
    after = done(double, transforms)
    assert apart(expected, logits(transformers_norms_by_torch(after))) < 1e-12
    assert any(not torch.equal(weight, before[name]) for name, weight in after.state_dict().items())


@pytest.mark.parametrize("width", [64, 96, 24, 7])
def test_a_rotation_is_orthogonal_and_scipys_hadamard_matrix_times_signs_and_an_odd_part(width):
    rotation = Rotation.drawn(width, torch.Generator().manual_seed(0))
    odd = len(rotation.odd)
    known = torch.tensor(hadamard(width // odd), dtype=torch.float64) / (width // odd) ** 0.5
    matrix = rotation.of_rows(torch.eye(width, dtype=torch.float64))
    assert torch.allclose(matrix, rotation.signs.diag() @ torch.kron(known, rotation.odd), atol=1e-14)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64), atol=1e-14)
    x = torch.randn(width, 5, dtype=torch.float64)
    assert torch.allclose(rotation.of_columns(x), matrix.t() @ x, atol=1e-13)
    assert set(rotation.signs.tolist()) == {-1.0, 1.0}


def test_after_a_rotation_of_the_residual_stream_norms_are_1_and_the_head_is_its_own():
    model = done(random_model("qwen3"), [RESIDUAL])
    for site in (site for site in walk(model) if site.kind == "norm"):
        inside = site.name.endswith(("q_norm", "k_norm"))
        assert bool((model.get_submodule(site.path).weight == 1).all()) is not inside
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_outliers_of_the_residual_stream_are_spread_as_quarot_says():
    """QuaRot, section 3: an input of outlier channels becomes nearly Gaussian, whose kurtosis is 3 (excess 0)."""
    model = random_model("llama")
    model.model.embed_tokens.weight.data[:, 5] *= 60
    inputs = {}
    for name in ("before", "after"):
        with observe(
            model, ["model.layers.0.self_attn.q_proj"], on_input=lambda _, x, name=name: inputs.update({name: x})
        ):
            logits(model)
        done(model, [RESIDUAL])
    excess = {name: float(kurtosis(x.double(), axis=-1).mean()) for name, x in inputs.items()}
    peaks = {name: float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()) for name, x in inputs.items()}
    assert excess["before"] > 30 > 1 > excess["after"]
    assert peaks["before"] > 2 * peaks["after"]


@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_smoothing_is_equation_4_of_the_paper(alpha):
    model = random_model("qwen2", dtype=torch.float64)
    layer = copy.deepcopy(model).model.layers[1]
    inputs = {"self_attn.q_proj": [], "mlp.down_proj": []}
    with observe(
        model,
        [f"model.layers.1.{name}" for name in inputs],
        on_input=lambda path, x: inputs[path.removeprefix("model.layers.1.")].append(x.abs().amax(0)),
    ):
        for row in ROWS:
            model(torch.tensor([row]))
    done(model, [SMOOTH | {"alpha": alpha, "pairs": ["norm", "down"]}])
    after, norm = model.model.layers[1], layer.input_layernorm
    largest = {name: torch.stack(seen).amax(0) for name, seen in inputs.items()}

    weights = torch.cat([getattr(layer.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")])
    s = largest["self_attn.q_proj"].pow(alpha) / weights.abs().amax(0).pow(1 - alpha)
    assert torch.allclose(after.input_layernorm.weight, norm.weight / s)
    assert torch.allclose(after.self_attn.k_proj.weight, layer.self_attn.k_proj.weight * s)
    s = largest["mlp.down_proj"].pow(alpha) / layer.mlp.down_proj.weight.abs().amax(0).pow(1 - alpha)
    assert torch.allclose(after.mlp.down_proj.weight, layer.mlp.down_proj.weight * s)


@pytest.mark.parametrize(
    ("family", "transforms", "why"),
    [
        ("gemma", [RESIDUAL], r"GemmaForCausalLM.*input_layernorm is not x / rms\(x\) \* weight"),
        ("olmo2", [SMOOTH], "Olmo2ForCausalLM.*q_proj reads what no norm has made"),
        ("gpt2", [RESIDUAL], "GPT2LMHeadModel.*attn.c_attn"),
        ("mixtral", [RESIDUAL], "MixtralForCausalLM.*mlp.gate .router"),
        ("phi3", [HEADS], "Phi3ForCausalLM.*o_proj has no v_proj"),
    ],
)
def test_a_model_of_another_structure_is_refused_by_name_and_stays_as_it_was(family, transforms, why):
    model = random_model(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidValueError, match=why):
        done(model, transforms)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("saved"), build_tokenizer()
    build(Embedded(), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def made(saved, cache, transforms, dtype="float32"):
    spec = Model(path=str(saved), transforms=transforms, dtype=dtype)
    return transformed(saved, "digest", spec, lambda count: TEXTS * (count // 2), cache)


def test_the_folder_is_an_ordinary_model_with_a_note(saved, tmp_path):
    folder = made(saved, tmp_path, DONE["all"])
    ids = build_tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, after = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (saved, folder))
    note = note_of(folder)
    assert 0 < apart(expected, after) < 1e-5
    assert 0 < note.difference == note.stored_difference < 1e-5
    assert (note.untied, note.of, len(note.transforms)) == (True, "digest", 3)
    assert made(saved, tmp_path, DONE["all"]) == folder
    assert made(saved, tmp_path, DONE["heads"]) != folder


def test_what_bfloat16_adds_to_the_difference_is_told_apart(saved, tmp_path):
    note = note_of(made(saved, tmp_path, DONE["residual"], "bfloat16"))
    assert note.difference < 1e-5
    assert 1e-3 < note.stored_difference < 0.1


def test_a_transform_that_changes_the_function_leaves_no_model(saved, tmp_path, monkeypatch):
    def wrong(model, *_):
        model.model.layers[0].mlp.up_proj.weight.data *= 1.5

    monkeypatch.setattr(start_room, "apply", wrong)
    with pytest.raises(CheckFailed, match=r"rotate_heads changed the logits .* by up to 0\.\d+"):
        made(saved, tmp_path, DONE["heads"])
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.suffix != ".partial"]
