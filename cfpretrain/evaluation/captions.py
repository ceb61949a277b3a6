"""How well captions fit reference captions: CIDEr-D, BLEU, and the share that equals one of them.

The formulas are those of the COCO caption evaluation (arXiv 1411.5726, 1504.00325). Its tokenizer, a Java program,
is not used: texts are split into words in lower case, punctuation left out.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

_LONGEST = 4  # words of an n-gram
_LENGTH_SIGMA = 6.0  # words, of the Gaussian penalty for another length
_CIDER_SCALE = 10.0

# An n-gram's words, joined by blanks, with their number of occurrences.
NGrams = Counter[str]


def words_of(text: str) -> list[str]:
    """The words that captions are compared by: letters and digits in lower case, with apostrophes inside."""
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The scores of captions, one for each image.

    Args:
        captions: one an image.
        references: for each image at least one.

    Returns:
        "cider" (CIDEr-D, at most 10), "bleu_1" ... "bleu_4" (of the whole set, at most 1) and "exact_match", the share
        of captions whose words are those of a reference.

    Raises:
        ValueError: no images, an image without a reference, or other numbers of both.
    """
    if len(captions) != len(references):
        raise ValueError(f"expected references for {len(captions)} captions, got them for {len(references)}")
    if not captions or not all(references):
        raise ValueError("expected at least one caption, and a reference for each")
    found = [words_of(caption) for caption in captions]
    expected = [[words_of(one) for one in of_image] for of_image in references]
    num_exact = sum(one in of_image for one, of_image in zip(found, expected, strict=True))
    bleu = {f"bleu_{n}": score for n, score in enumerate(_bleu(found, expected), 1)}
    return {"cider": _cider_d(found, expected), **bleu, "exact_match": num_exact / len(found)}


def _ngrams(words: Sequence[str], n: int) -> NGrams:
    return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))


def _cider_d(found: Sequence[Sequence[str]], expected: Sequence[Sequence[Sequence[str]]]) -> float:
    """CIDEr-D (section 4 of arXiv 1411.5726): how alike tf-idf vectors of n-grams are, in the mean over n and images.

    An n-gram's document frequency is the number of images in whose references it occurs.
    """
    total = 0.0
    for n in range(1, _LONGEST + 1):
        references = [[_ngrams(words, n) for words in of_image] for of_image in expected]
        frequency = Counter(gram for of_image in references for gram in set().union(*of_image))
        for words, of_image, texts in zip(found, references, expected, strict=True):
            candidate = _weighted(_ngrams(words, n), frequency, len(found))
            alike = [
                _clipped_cosine(candidate, _weighted(grams, frequency, len(found)))
                * math.exp(-((len(words) - len(text)) ** 2) / (2 * _LENGTH_SIGMA**2))
                for grams, text in zip(of_image, texts, strict=True)
            ]
            total += sum(alike) / len(alike)
    return _CIDER_SCALE * total / _LONGEST / len(found)


def _weighted(grams: NGrams, frequency: Counter[str], num_images: int) -> dict[str, float]:
    return {gram: count * math.log(num_images / max(1, frequency[gram])) for gram, count in grams.items()}


def _clipped_cosine(candidate: dict[str, float], reference: dict[str, float]) -> float:
    """The cosine of two vectors, where no n-gram of the candidate counts more than in the reference."""
    product = sum(
        min(value, reference[gram]) * reference[gram] for gram, value in candidate.items() if gram in reference
    )
    lengths = math.hypot(*candidate.values()) * math.hypot(*reference.values())
    return product / lengths if lengths else 0.0


def _bleu(found: Sequence[Sequence[str]], expected: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """BLEU of up to 1, 2, 3 and 4 words over all captions, each against its reference of the closest length."""
    num_words = sum(map(len, found))
    num_expected = sum(
        min((abs(len(text) - len(words)), len(text)) for text in of_image)[1]
        for words, of_image in zip(found, expected, strict=True)
    )
    brevity = min(0.0, 1 - num_expected / num_words) if num_words else -math.inf
    scores, log_precision = [], 0.0
    for n in range(1, _LONGEST + 1):
        num_right = num_all = 0
        for words, of_image in zip(found, expected, strict=True):
            grams = _ngrams(words, n)
            most: NGrams = Counter()
            for text in of_image:
                most |= _ngrams(text, n)
            num_right += (grams & most).total()
            num_all += grams.total()
        log_precision += math.log(num_right / num_all) if num_right else -math.inf
        scores.append(math.exp(brevity + log_precision / n))
    return scores
