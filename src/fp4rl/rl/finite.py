"""No token is drawn from NaN: greedy decoding would make some token of it, and an evaluation a score."""

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor, PreTrainedModel

from fp4rl.models.positions import forward_inputs
from fp4rl.sites.observe import require_finite_rows


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Raises NotFinite at logits that nothing can be drawn from."""

    def __init__(self, model: PreTrainedModel, mask: Tensor) -> None:
        self._model, self._mask = model, mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at the logits [answers, vocabulary] that the next token is drawn from; return them unchanged."""
        require_finite_rows(scores, "logits", self._model, partial(self._again, input_ids))
        return scores

    def _again(self, ids: Tensor) -> Any:
        real = self._mask.repeat_interleave(len(ids) // len(self._mask), 0)
        real = pad(real, (0, ids.shape[1] - real.shape[1]), value=1)
        return self._model(**forward_inputs(self._model, ids, real), use_cache=False)
