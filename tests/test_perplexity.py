"""Perplexity of captions: what a forward of image and text together makes of them."""

import dataclasses

import pytest
import torch

from cfpretrain.core import seeds
from cfpretrain.core.modalities import IMAGE, loss_of
from cfpretrain.core.segments import Segment, build_layout
from cfpretrain.core.texts import text_segment
from cfpretrain.evaluation.perplexity import caption_likelihood, perplexity
from tests.test_modalities import NUM_WORDS, predict, text_model
from tests.test_tasks import MARKS

IMAGES = seeds.normal(seeds.fold(seeds.key(3, "images"), torch.arange(3)), (9, 4)).double()
TEXTS = [[4, 5, 6], [], [7, 4, 4, 9, 10]]


@pytest.mark.parametrize("trunk", ["causalfusion", "llama"])
def test_likelihood_is_that_of_a_whole_forward(trunk: str) -> None:
    """Of each caption alone; of those together, whose lengths differ, the sum."""
    model = text_model(trunk)
    alone = []
    for i, text in enumerate(TEXTS):
        ids_BT = torch.tensor([[MARKS.begin, *text, MARKS.end]])
        steps_BL, positions_BL = torch.zeros(1, 9, dtype=torch.int64), torch.arange(9)[None]
        image = Segment(IMAGE, steps_BL, clean=IMAGES[[i]], positions_BL=positions_BL, ordinal_B=torch.tensor([0]))
        learned = text_segment(ids_BT, is_learned_B=torch.tensor([True]))
        segments = [image, dataclasses.replace(learned, ordinal_B=torch.tensor([1]))]
        with torch.no_grad():
            terms = loss_of(predict(model, segments, build_layout(segments)), segments)["text"]
        alone.append((-float(terms.total), len(text) + 1))
        assert caption_likelihood(model, IMAGES[[i]], [text], MARKS) == pytest.approx(alone[-1], rel=1e-5)
    together = caption_likelihood(model, IMAGES, TEXTS, MARKS)
    assert together == pytest.approx(tuple(map(sum, zip(*alone, strict=True))), rel=1e-5)
    assert perplexity([together]) == pytest.approx(
        perplexity(caption_likelihood(model, IMAGES[[i]], [TEXTS[i]], MARKS) for i in range(3))
    )


def test_who_knows_nothing_has_the_perplexity_of_the_vocabulary() -> None:
    model = text_model()
    with torch.no_grad():
        model.text_head.linear.weight.zero_()
    assert perplexity([caption_likelihood(model, IMAGES, TEXTS, MARKS)]) == pytest.approx(NUM_WORDS)


def test_of_a_model_that_diverged_it_is_infinite() -> None:
    """It ends no training, and metrics say null."""
    model = text_model()
    with torch.no_grad():
        model.text_head.linear.weight.mul_(1e6)
    assert perplexity([caption_likelihood(model, IMAGES, TEXTS, MARKS)]) == float("inf")
