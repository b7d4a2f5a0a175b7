"""Signs that a rollout is dead although its length looks well: answers without content, answers that go in circles."""

from collections.abc import Sequence

NGRAM = 4


def repeated_share(token_ids: Sequence[int], ngram: int = NGRAM) -> float:
    """Share of an answer's n-grams that occurred before in it: 0 when all differ, near 1 for a loop.

    0 for an answer shorter than `ngram` tokens. Source: arXiv 2502.03373, appendix C.2 (there a penalty).
    """
    count = len(token_ids) - ngram + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(token_ids[i : i + ngram]) for i in range(count)}) / count


def answer_metrics(completion_ids: Sequence[Sequence[int]], ended: Sequence[bool]) -> dict[str, float]:
    """For metrics.jsonl; `completion_ids` with the end token where there is one, `ended` says whether there is.

    `response_length/empty_ratio`: share of answers that are nothing but their end. `response/repetition`: mean share
    of repeated 4-grams. Empty without answers.
    """
    if not completion_ids:
        return {}
    empty = sum(len(ids) - end <= 0 for ids, end in zip(completion_ids, ended, strict=True))
    return {
        "response_length/empty_ratio": empty / len(completion_ids),
        "response/repetition": sum(repeated_share(ids) for ids in completion_ids) / len(completion_ids),
    }
