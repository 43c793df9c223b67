"""Scores: equal to the reference implementations on the same tokens, whatever the order of the prompts."""

import random
from collections.abc import Sequence

import pytest

from vl_dist.evaluate.scores import (
    bleu,
    cider_d,
    common_length,
    document_frequency,
    exact_match,
    rouge_l,
    score_captions,
    tokenize,
)

WORDS = (
    *("a", "the", "man", "woman", "dog", "cat", "red", "small", "on", "in", "table", "rides", "holds", "wave", "board"),
    *("tree", "sits", "near", "two"),
)
Documents = tuple[list[list[str]], list[list[list[str]]]]


def captions(count: int, *, seed: int, most_references: int = 5) -> Documents:
    """Predictions that share n-grams with their references, and some that are empty, short or unrelated."""
    rng = random.Random(seed)
    references = [
        [rng.choices(WORDS, k=rng.randint(1, 16)) for _ in range(rng.randint(1, most_references))] for _ in range(count)
    ]
    predictions = []
    for n, several in enumerate(references):
        cut = rng.choice(several)[: rng.randint(1, 12)]
        predictions.append([] if n % 17 == 3 else [*cut, *rng.choices(WORDS, k=rng.randint(0, 3))])
    return predictions, references


def joined(rows: Sequence[Sequence[str]]) -> list[str]:
    return [" ".join(row) for row in rows]


def test_cider_d_equals_pycocoevalcap_on_the_same_tokens() -> None:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    predictions, references = captions(120, seed=1)
    reference = CiderScorer()
    for predicted, accepted in zip(predictions, references, strict=True):
        reference += (" ".join(predicted), joined(accepted))
    mean, each = reference.compute_score()
    ours = cider_d(predictions, references)
    assert ours == pytest.approx(list(each), abs=1e-6)
    assert sum(ours) / len(ours) == pytest.approx(mean, abs=1e-6)
    assert max(ours) > 1, "the captions are too unlike to test anything"


def test_cider_d_takes_rarity_from_other_documents_when_they_are_given() -> None:
    prediction, references = [["a", "red", "dog"]], [[["a", "red", "dog"], ["the", "cat"]]]
    assert cider_d(prediction, references) == [0.0]  # one document: nothing is rare
    documents = [[["a", "dog"]], [["a", "cat"]], [["the", "tree"]], [["a"]]]
    given = cider_d(prediction, references, document_frequency(documents))
    # The first reference is the prediction and has no four-gram: three orders of four. The second shares no word.
    assert given == pytest.approx([10 * (3 / 4 + 0) / 2])
    # A word that every document has weighs nothing.
    everywhere = document_frequency([[["a"]], [["a"]]])
    assert cider_d([["a"]], [[["a"]]], everywhere) == [0.0]


@pytest.mark.parametrize("seed", [1, 2])
def test_bleu_equals_sacrebleu_without_smoothing(seed: int) -> None:
    import sacrebleu

    predictions, references = captions(80, seed=seed)
    columns = [[" ".join(several[k]) if k < len(several) else None for several in references] for k in range(5)]
    for order, ours in enumerate(bleu(predictions, references), start=1):
        made = sacrebleu.BLEU(smooth_method="none", tokenize="none", max_ngram_order=order)
        assert ours == pytest.approx(made.corpus_score(joined(predictions), columns).score / 100, abs=1e-9)
        assert ours > 0.1


def test_bleu_is_zero_where_an_order_has_no_match_and_where_nothing_was_said() -> None:
    assert bleu([["a", "b", "x", "c", "d"]], [[["a", "b", "c", "d"]]])[2:] == [0.0, 0.0]
    assert bleu([["a"]], [[["a"]]]) == [1.0, 0.0, 0.0, 0.0]
    assert bleu([[]], [[["a"]]]) == [0.0] * 4
    assert bleu([], []) == [0.0] * 4


def test_bleu_compares_with_the_length_of_the_nearest_reference_and_of_two_the_shorter() -> None:
    predicted = [["a", "b", "c", "d"]]
    assert bleu(predicted, [[["a", "b"], ["a", "b", "c", "d", "e", "f"]]])[0] == pytest.approx(1.0)  # 2 and 6 are as near
    assert bleu(predicted, [[["a", "b", "c", "d", "e"], ["a"]]])[0] == pytest.approx(2.718281828 ** (1 - 5 / 4))


def test_rouge_l_equals_rouge_score_with_beta_one_and_one_reference() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    class Given:
        def tokenize(self, text: str) -> list[str]:
            return text.split()

    scorer = RougeScorer(["rougeL"], tokenizer=Given())
    predictions, references = captions(80, seed=3, most_references=1)
    for predicted, [reference] in zip(predictions, references, strict=True):
        expected = scorer.score(" ".join(reference), " ".join(predicted))["rougeL"].fmeasure
        assert rouge_l(predicted, [reference], beta=1) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_equals_pycocoevalcap_with_several_references() -> None:
    from pycocoevalcap.rouge.rouge import Rouge

    predictions, references = captions(80, seed=4)
    for predicted, accepted in zip(predictions, references, strict=True):
        expected = Rouge().calc_score([" ".join(predicted)], joined(accepted))
        assert rouge_l(predicted, accepted) == pytest.approx(expected, abs=1e-12)


def test_the_longest_common_subsequence_may_skip_words_on_either_side() -> None:
    assert common_length(["a", "x", "b", "y", "c"], ["a", "b", "z", "c"]) == 3
    assert common_length(["a", "b"], ["b", "a"]) == 1
    assert common_length([], ["a"]) == common_length(["a"], []) == 0


def test_a_prediction_is_exact_if_it_equals_one_of_the_references() -> None:
    assert exact_match(["a", "b", "c"], [["a", "x"], ["x", "b"], ["C"]]) == pytest.approx(2 / 3)
    assert exact_match([], []) == 0.0


def test_no_score_depends_on_the_order_of_prompts_or_references() -> None:
    predicted, accepted = captions(100, seed=5)
    predictions, references = joined(predicted), [joined(several) for several in accepted]
    scores = score_captions(predictions, references)
    names = ["eval/cider", *(f"eval/bleu{n}" for n in range(1, 5)), "eval/rouge_l", "eval/exact_match"]
    assert list(scores.columns) == names
    rng = random.Random(6)
    for _ in range(3):
        order = rng.sample(range(100), 100)
        shuffled = [rng.sample(references[n], len(references[n])) for n in order]
        again = score_captions([predictions[n] for n in order], shuffled)
        assert again.columns == pytest.approx(scores.columns, rel=0, abs=1e-12)
        assert list(again.each) == pytest.approx([scores.each[n] for n in order], rel=0, abs=1e-12)


def test_scores_of_nothing_are_zero() -> None:
    assert set(score_captions([], []).columns.values()) == {0.0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # As PTBTokenizer -lowerCase and the punctuation list of the COCO caption tools give it.
        ("A man's dog doesn't like the t-shirt.", "a man 's dog does n't like the t-shirt"),
        ("The dogs' owner isn't here; I'm late, we'll go", "the dogs owner is n't here i 'm late we 'll go"),
        ("Two dogs, a cat - and 3.5 birds at 10:30!", "two dogs a cat and 3.5 birds at 10:30"),
        ('"1,000" & 50% off $5', "1,000 & 50 % off $ 5"),
        ("it\u2019s \u201cnear\u201d  o'clock\n...", "it 's near o'clock"),
        ("a red/blue kite in the U.S. 1/2 mile from #1", "a red/blue kite in the u.s. 1/2 mile from # 1"),
        ("Caf\u00e9 one--two `x'", "caf\u00e9 one two x"),
        # Where ours differs.
        ("a bus (old). Cannot", "a bus old cannot"),
        ("\u4e00\u53ea\u72d7\u3002two", "\u4e00 \u53ea \u72d7 two"),
        ("", ""),
    ],
)  # fmt: skip
def test_words_are_lower_case_without_punctuation(text: str, words: str) -> None:
    assert tokenize(text) == words.split()
