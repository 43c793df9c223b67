"""Scores of predictions against references: CIDEr-D, BLEU, ROUGE-L and exact match. Pure functions of text.

All but exact match compare tokens (`tokenize`). Sums over prompts are exactly rounded, so that no score depends on the
order of the prompts, and thereby not on the number of ranks that answered them.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import regex

MAX_ORDER = 4  # longest n-gram of CIDEr-D and BLEU
CIDER_SIGMA = 6.0  # tokens; how fast CIDEr-D falls with a difference in length
CIDER_SCALE = 10.0  # a prediction that is its only reference scores this much
ROUGE_BETA = 1.2  # recall counts more than precision in ROUGE-L, as in the COCO caption tools

Tokens = Sequence[str]

_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}"
_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{_SPACELESS}]]"
_WORD = rf"{_LETTER}+(?:['/-]{_LETTER}+|(?<=\d)[.,:](?=\d){_LETTER}+)*"
_TOKEN = regex.compile(rf"(?<!{_LETTER})(?:[a-z]\.){{2,}}|{_WORD}|\S", regex.VERSION1)
_CLITIC = regex.compile(r"(?<=\w)(?:n't|'(?:s|re|ve|ll|d|m))$")
_STRAIGHT_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_SYMBOLS_KEPT = "&%#@*/"  # Unicode calls them punctuation; the COCO caption tools count them as words


@dataclass(frozen=True, slots=True)
class DocumentFrequency:
    """In how many documents each n-gram occurs; a document is all references of one prompt."""

    num_documents: int
    counts: Mapping[str, int]  # by n-gram, its tokens joined by spaces


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Scores over all prompts by their column of metrics.jsonl, and CIDEr-D of each prompt."""

    columns: dict[str, float]
    each: tuple[float, ...]


def score_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]], frequency: DocumentFrequency | None = None
) -> CaptionScores:
    """Every score of predicted texts.

    Args:
        predictions: one for each prompt.
        references: the accepted answers of each prompt, in the same order.
        frequency: for CIDEr-D; None: that of the references.
    """
    assert len(predictions) == len(references), "one list of references for each prediction"
    predicted = [tokenize(text) for text in predictions]
    accepted = [[tokenize(text) for text in texts] for texts in references]
    each = cider_d(predicted, accepted, frequency)
    columns = {"eval/cider": mean(each)}
    columns |= {f"eval/bleu{n}": value for n, value in enumerate(bleu(predicted, accepted), start=1)}
    columns["eval/rouge_l"] = mean([rouge_l(one, several) for one, several in zip(predicted, accepted, strict=True)])
    columns["eval/exact_match"] = exact_match(predictions, references)
    return CaptionScores(columns, tuple(each))


def tokenize(text: str) -> list[str]:
    """Words in lower case without punctuation, after the Penn Treebank's rules as far as captions need them.

    Clitics are words of their own (`man's` is `man 's`, `don't` is `do n't`); hyphens and slashes inside a word and points,
    commas and colons inside a number stay (`t-shirt`, `1,000`, `10:30`); symbols such as `&`, `%` and `$` count as words.
    On plain English captions this equals the COCO caption tools, which call Stanford's PTBTokenizer in Java and then drop
    punctuation. It differs where that one splits `cannot` or `gonna`, keeps the point of `mr.` or `dr.`, writes brackets as
    words (`-lrb-`) or keeps an emoticon whole. Here a character of a script without spaces (Chinese, Japanese) is a word.
    """
    words: list[str] = []
    for token in _TOKEN.findall(text.lower().translate(_STRAIGHT_QUOTES)):
        if len(token) == 1:
            if token in _SYMBOLS_KEPT or (not unicodedata.category(token).startswith(("P", "C")) and token != "`"):
                words.append(token)
            continue
        clitic = _CLITIC.search(token)
        words += [token] if clitic is None else [token[: clitic.start()], clitic.group()]
    return words


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal one of their references to the letter."""
    hits = [prediction in accepted for prediction, accepted in zip(predictions, references, strict=True)]
    return sum(hits) / max(1, len(hits))


def document_frequency(documents: Iterable[Sequence[Tokens]]) -> DocumentFrequency:
    """Counts n-grams of one to four tokens over documents, each the references of one prompt."""
    counts: Counter[str] = Counter()
    num_documents = 0
    for references in documents:
        num_documents += 1
        counts.update({gram for tokens in references for order in ngrams(tokens) for gram in order})
    return DocumentFrequency(num_documents, counts)


def cider_d(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], frequency: DocumentFrequency | None = None
) -> list[float]:
    """CIDEr-D of each prompt (Vedantam, Zitnick and Parikh, 2015), from 0 to 10; the score of a set is their mean.

    Equal to `pycocoevalcap.cider` on the same tokens: n-grams weighted by how rare they are among prompts, clipped cosine
    similarity with each reference, a Gaussian penalty on the difference in length, mean over orders and references, times
    10. With a single prompt nothing is rare and the score is 0, unless a frequency of more documents is given.

    Args:
        predictions: one for each prompt.
        references: at least one for each prompt.
        frequency: None: that of the references.
    """
    known = document_frequency(references) if frequency is None else frequency
    weigher = _Weigher(known)
    scores = []
    for predicted, accepted in zip(predictions, references, strict=True):
        vector = weigher.vector(predicted)
        similarities = [_similarity(vector, weigher.vector(reference)) for reference in accepted]
        scores.append(CIDER_SCALE * mean(similarities))
    return scores


def bleu(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the whole set (Papineni et al., 2002), from 0 to 1.

    Equal to `sacrebleu.corpus_bleu(..., smooth_method="none", max_ngram_order=n) / 100` on the same tokens: clipped counts
    summed over the set, the reference length nearest to the prediction's (the shorter of two), no smoothing. sacrebleu's
    default smoothing differs where no n-gram of some order matches: here the score is then 0. `pycocoevalcap.bleu` adds
    1e-15 to matches and takes the mean reference length where there is only one prompt.
    """
    matches, totals = [0] * MAX_ORDER, [0] * MAX_ORDER
    predicted_length = reference_length = 0
    for predicted, accepted in zip(predictions, references, strict=True):
        predicted_length += len(predicted)
        reference_length += min((len(one) for one in accepted), key=lambda n: (abs(n - len(predicted)), n))
        allowed: list[Counter[str]] = [Counter() for _ in range(MAX_ORDER)]
        for reference in accepted:
            for most, order in zip(allowed, ngrams(reference), strict=True):
                most |= order  # the largest count in any one reference
        for n, order in enumerate(ngrams(predicted)):
            matches[n] += sum(min(count, allowed[n][gram]) for gram, count in order.items())
            totals[n] += order.total()
    if predicted_length == 0:
        return [0.0] * MAX_ORDER
    brevity = min(1.0, math.exp(1 - reference_length / predicted_length))
    precisions = [match / total if total else 0.0 for match, total in zip(matches, totals, strict=True)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, MAX_ORDER + 1)]


def rouge_l(prediction: Tokens, references: Sequence[Tokens], *, beta: float = ROUGE_BETA) -> float:
    """ROUGE-L of one prompt (Lin, 2004), from 0 to 1: longest common subsequence against the references.

    Equal to `pycocoevalcap.rouge`: the best precision and the best recall over references, each on its own, in an F-measure
    with beta 1.2. `rouge_score` takes beta 1 and the best F-measure over references: with one reference and `beta=1` the
    two are equal; with several, or another beta, they are not.
    """
    if not prediction:
        return 0.0
    lengths = [(common_length(prediction, reference), len(reference)) for reference in references]
    precision = max(common / len(prediction) for common, _ in lengths)
    recall = max(common / max(1, length) for common, length in lengths)
    if precision == 0.0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def common_length(one: Tokens, other: Tokens) -> int:
    """Length of the longest common subsequence, bit by bit in whole numbers (Hyyrö, 2004)."""
    places: dict[str, int] = {}
    for n, token in enumerate(other):
        places[token] = places.get(token, 0) | 1 << n
    full = (1 << len(other)) - 1
    unmatched = full
    for token in one:
        here = unmatched & places.get(token, 0)
        unmatched = (unmatched + here | unmatched - here) & full
    return len(other) - unmatched.bit_count()


def ngrams(tokens: Tokens) -> list[Counter[str]]:
    """Counts of n-grams by order, one to four, their tokens joined by spaces."""
    return [
        Counter([" ".join(tokens[start : start + n]) for start in range(len(tokens) - n + 1)])
        for n in range(1, MAX_ORDER + 1)
    ]


def mean(values: Sequence[float]) -> float:
    """Exactly rounded, whatever the order; 0 of nothing."""
    return math.fsum(values) / max(1, len(values))


@dataclass(frozen=True, slots=True)
class _Vector:
    """A text as CIDEr-D sees it: per order, the weight of each n-gram and their norm."""

    weights: list[dict[str, float]]
    norms: list[float]
    length: int  # bigrams: what the reference implementation counts as length


class _Weigher:
    """Turns texts into vectors; remembers weights, since most n-grams come again."""

    def __init__(self, frequency: DocumentFrequency) -> None:
        self._counts = frequency.counts
        self._log_documents = math.log(max(1, frequency.num_documents))
        self._rarity: dict[str, float] = {}

    def vector(self, tokens: Tokens) -> _Vector:
        weights = [{gram: count * self._of(gram) for gram, count in order.items()} for order in ngrams(tokens)]
        norms = [math.sqrt(math.fsum(weight * weight for weight in order.values())) for order in weights]
        return _Vector(weights, norms, max(0, len(tokens) - 1))

    def _of(self, gram: str) -> float:
        if gram not in self._rarity:
            self._rarity[gram] = self._log_documents - math.log(max(1, self._counts.get(gram, 0)))
        return self._rarity[gram]


def _similarity(predicted: _Vector, reference: _Vector) -> float:
    total = 0.0
    for ours, theirs, our_norm, their_norm in zip(
        predicted.weights, reference.weights, predicted.norms, reference.norms, strict=True
    ):
        if our_norm > 0 and their_norm > 0:
            product = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
            total += product / (our_norm * their_norm)
    difference = predicted.length - reference.length
    return total / MAX_ORDER * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
