"""How tokens are chosen: greedily, by the law asked for, and alike in a batch of any size."""

import pytest
import torch

from cfpretrain.core import seeds
from cfpretrain.core.token_choice import TokenChoice

LOGITS = torch.tensor([2.0, 0.5, 1.5, -1.0, 0.0])
NUM_DRAWS = 20_000


def shares(choice: TokenChoice) -> torch.Tensor:
    """How often each token is chosen."""
    keys = seeds.fold(seeds.key(0, "tokens"), torch.arange(NUM_DRAWS))
    return torch.bincount(choice(LOGITS.expand(NUM_DRAWS, -1), keys), minlength=len(LOGITS)) / NUM_DRAWS


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (TokenChoice(temperature=1.0), [0, 1, 2, 3, 4]),
        (TokenChoice(temperature=0.5), [0, 1, 2, 3, 4]),
        (TokenChoice(temperature=2.0, top_k=3), [0, 1, 2]),
        (TokenChoice(temperature=1.0, top_p=0.7), [0, 2]),  # 0.49 and 0.30 of the probability
        (TokenChoice(temperature=1.0, top_k=1), [0]),
        (TokenChoice(temperature=1.0, top_p=1e-9), [0]),
    ],
)
def test_tokens_follow_the_softmax_of_those_kept(choice: TokenChoice, kept: list[int]) -> None:
    expected = torch.zeros(len(LOGITS))
    expected[kept] = (LOGITS[kept] / choice.temperature).softmax(0)
    found = shares(choice)
    assert (found > 0).tolist() == (expected > 0).tolist()
    assert (found - expected).abs().max() < 5 * 0.5 / NUM_DRAWS**0.5  # five standard deviations at most


def test_without_a_temperature_the_likeliest_is_taken() -> None:
    logits_BV = torch.stack([LOGITS, LOGITS.flip(0)])
    for temperature in (0.0, 5e-324, 1e-42, 1e-35, 1e-29):  # in fp32, which logits are divided in, 0 or nearly so
        choice = TokenChoice(temperature)
        assert choice(logits_BV, torch.zeros(2, dtype=torch.int64)).tolist() == [0, 4], temperature


def test_a_row_draws_alike_alone_and_in_a_batch_and_whatever_order_equal_logits_have() -> None:
    keys = seeds.fold(seeds.key(1, "tokens"), torch.arange(8))
    logits_BV = seeds.normal(keys, (50,))
    choice = TokenChoice(temperature=1.0, top_k=20, top_p=0.9)
    together = choice(logits_BV, keys)
    assert together.tolist() == [int(choice(logits_BV[[i]], keys[[i]])) for i in range(8)]
    assert len(set(together.tolist())) > 1
    nearly = logits_BV + 1e-6 * seeds.normal(seeds.key(2, "rounding"), (50,))
    assert torch.equal(choice(nearly, keys), together)
