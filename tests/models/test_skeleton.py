"""A model's modules without its weights: what cannot be built is one line."""

import pytest
from transformers import DbrxConfig

from fp4rl.models.load import skeleton
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.errors import InvalidValueError


def test_a_class_that_fails_on_its_own_configuration_is_refused_without_a_traceback(tmp_path):
    """The kind: what a model class raises while it is built. DBRX of transformers 5.23 asks for a setting that its
    own configuration lacks, an AttributeError."""
    tokenizer = build_tokenizer()
    DbrxConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        InvalidValueError, match="cannot be read: 'DbrxAttentionConfig' object has no attribute 'rope_theta'"
    ):
        skeleton(tmp_path)
