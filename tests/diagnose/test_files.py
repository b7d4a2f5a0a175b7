"""Weights scanned from their files, whatever the files call them, are those of the loaded model."""

import pytest
import zoo_families as families
from tiny_models import MULTIMODAL, MULTIMODAL_MIXTURES, multimodal

from fp4rl.diagnose.precision import stored_weight_errors, weight_errors
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.injection import Injection

# Left out: what no injection takes (docs/models.md).
REFUSED = ("deepseek_v4", "dbrx")
W4A16 = Injection.named("w4a16")


def require_alike(folder):
    _, stored, _ = stored_weight_errors(folder, W4A16)
    model, _ = load(folder)
    live, _ = weight_errors(model, resolve(model, W4A16))
    assert [part.site for part in stored] == [part.site for part in live]
    for found, known in zip(stored, live, strict=True):
        assert dict(found.measures) == pytest.approx(dict(known.measures), rel=1e-6)


@pytest.mark.parametrize("family", [*MULTIMODAL, *MULTIMODAL_MIXTURES])
def test_a_multimodal_folder(family, tmp_path):
    """Fault: files of Gemma-3 and Qwen2.5-VL, which keep older names, 'hold no tensor' of the text model."""
    multimodal(family).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    require_alike(tmp_path)


def test_experts_without_a_gate(tmp_path):
    require_alike(families.folder("nemotron_h", tmp_path / "nemotron_h"))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family not in REFUSED])
def test_every_family(family, tmp_path):
    require_alike(families.folder(family, tmp_path / family))
