"""A run of a transformed start: what it records, what it leaves behind, and that references keep the old function."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fp4rl.models.load import load
from fp4rl.rl.inputs import of_model

TURNED = {"transforms": ["rotate_residual", "rotate_heads", {"name": "smooth", "prompts": 4}]}
ONCE = {"steps": 1, "mini_batch_size": 4, "entropy_coeff": 0.0}  # one update: losses are those of the start


def test_a_run_starts_from_the_same_function_and_ends_as_an_ordinary_folder(run, experiment, start_folder):
    trained, heard = run(experiment("w4a4", model=TURNED))
    (line,) = heard.of("transformed")
    assert 0 < line["difference"] < 1e-5
    assert (line["untied"], line["of"]) == (True, of_model(start_folder))
    inputs = trained.evidence.inputs
    assert inputs["untransformed model"] == of_model(start_folder) != inputs["start model"] == of_model(trained.start)
    final = AutoModelForCausalLM.from_pretrained(trained.final)
    assert final.config.tie_word_embeddings is False
    norms, before = (m.model.layers[0].input_layernorm.weight for m in (final, load(start_folder)[0]))
    assert not torch.allclose(norms, before, atol=1e-2)


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["whole", "adapter"])
def test_teacher_and_reference_are_the_function_of_the_model_before(run, experiment, start_folder, adapter):
    """Oracle: the KL to a teacher in the untouched folder is 0, and so is that to the transformed start."""
    for teacher in ("start", {"path": str(start_folder)}):
        training = ONCE | {"kl_loss_coef": 0.1, "distillation": {"teacher": teacher}}
        _, heard = run(experiment(model=TURNED | {"lora": adapter}, training=training), name=str(teacher)[:5])
        ((_, metrics),) = heard.steps
        assert metrics["distill/kl"] == pytest.approx(0, abs=1e-7)
        assert metrics["kl_loss"] == pytest.approx(0, abs=1e-7)
