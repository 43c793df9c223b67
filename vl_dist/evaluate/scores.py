"""Scores of predictions against references; pure functions of text."""

from collections.abc import Sequence


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal one of their references to the letter.

    Args:
        predictions: one for each prompt.
        references: the accepted answers of each prompt, in the same order.
    """
    assert len(predictions) == len(references), "one list of references for each prediction"
    hits = [prediction in accepted for prediction, accepted in zip(predictions, references, strict=True)]
    return sum(hits) / max(1, len(hits))
