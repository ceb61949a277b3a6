"""Which token comes next: greedy, or drawn from the likeliest, by randomness that is a function of a key."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cfpretrain.core import seeds

# Below, quotients leave the range of fp32, and equal infinities would hide which logit is the largest.
_COLDEST = 1e-30


@dataclass(frozen=True)
class TokenChoice:
    """How a token is chosen from logits.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token, and so do those that are as good as 0.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens whose probabilities, added up, first reach p (arXiv 1904.09751); 1: all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits_BV: Tensor, keys_B: Tensor) -> Tensor:
        """int64 [B], the tokens chosen; equal logits and keys (`seeds`) choose equal tokens, in a batch of any size."""
        logits_BV = logits_BV.float()
        if self.temperature < _COLDEST:
            return logits_BV.argmax(-1)
        sorted_BV, ids_BV = (logits_BV / self.temperature).sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(sorted_BV.shape[1], device=sorted_BV.device)
        if self.top_k:
            sorted_BV = sorted_BV.masked_fill(rank_V >= self.top_k, -torch.inf)
        probability_BV = sorted_BV.softmax(-1)
        # The first token always stays: nothing likelier stands before it.
        before_BV = probability_BV.cumsum(-1) - probability_BV
        kept_BV = sorted_BV.masked_fill(before_BV >= self.top_p, -torch.inf)
        # The largest of logits plus Gumbel noise is a draw from their softmax. A token has its own noise wherever it is
        # sorted, so that rounding of the logits hardly ever changes what is drawn.
        uniform_BV = seeds.uniform(keys_B, (sorted_BV.shape[1],)).to(kept_BV.device)
        gumbel_BV = -torch.log(-torch.log(uniform_BV)).float()
        chosen_B1 = (kept_BV + gumbel_BV.gather(1, ids_BV)).argmax(-1, keepdim=True)
        return ids_BV.gather(1, chosen_B1).squeeze(1)
