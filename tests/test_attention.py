"""Attention under row intervals against a float64 dense oracle."""

import pytest
import torch

from cfpretrain import order, seeds
from cfpretrain.model.attention import attend, dense_mask


def oracle(q, k, v, may_attend):
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill(~may_attend, -torch.inf).softmax(-1) @ v.double()


@pytest.mark.parametrize("sizes", [[5], [1] * 7, [3, 1, 6], [2, 2, 9, 1]])
def test_output_and_gradients(sizes) -> None:
    layout = order.build_layout([order.Condition(3), order.Image(order.steps_from_sizes(sizes)[None])])
    M = layout.step_BM.shape[1]
    inputs = seeds.normal(seeds.fold(seeds.key(0, "qkv"), torch.arange(3)), (2, 2, M, 8))
    direction = seeds.normal(seeds.key(0, "direction"), (2, 2, M, 8))
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    q64, k64, v64 = (x.double().requires_grad_() for x in inputs)
    out = attend(q, k, v, dense_mask(layout.intervals_BMI, M))
    want = oracle(q64, k64, v64, order.may_attend(layout.intervals_BMI, M).unsqueeze(1))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    (out * direction).sum().backward()
    (want * direction).sum().backward()
    for ours, theirs in ((q, q64), (k, k64), (v, v64)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_no_intervals_means_everything_is_visible() -> None:
    q, k, v = seeds.normal(seeds.fold(seeds.key(0, "qkv"), torch.arange(3)), (1, 1, 4, 8))
    want = oracle(q, k, v, torch.ones(4, 4, dtype=torch.bool))
    torch.testing.assert_close(attend(q, k, v, dense_mask(None, 4)).double(), want, rtol=1e-5, atol=1e-5)
