"""Token-wise constrained SFT.

Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep" (arXiv 2406.05946), eq. 3:
for an answer y and the aligned model pi_0,

    loss = - sum_t (2 / beta_t) log sigma(beta_t (log pi(y_t | ...) - log pi_0(y_t | ...))).

The gradient of a term is that of the NLL times 2 sigma(-beta_t (log pi - log pi_0)): 1 where both models
agree, towards 0 once the tuned model is surer of the token than the aligned one, the sooner the larger
beta_t. So the first tokens, which decide whether an answer is a refusal, move little.
"""

import torch
from torch import Tensor
from torch.nn import functional

FIRST, EARLY, LATER = 0.5, 2.0, 0.1
"""beta_t of the paper: of the first answer token, of tokens 2 to 5, and of all after."""


def betas(positions: Tensor) -> Tensor:
    """beta_t (P,), float32, of answer tokens at these places (P,), int64, the first at 0."""
    early = torch.where(positions < 5, EARLY, LATER)
    return torch.where(positions == 0, FIRST, early)


def constrained_sft_loss(logprobs: Tensor, reference_logprobs: Tensor, positions: Tensor) -> Tensor:
    """The constrained objective, the mean over answer tokens; float32.

    Args:
        logprobs: (P,), log-probabilities of the answer tokens under the model that is tuned, nats.
        reference_logprobs: (P,), under the aligned model; no gradient flows into them.
        positions: (P,) int64, the place of each token in its answer, the first at 0.

    Raises:
        ValueError: the shapes differ, or a position is negative.
    """
    if logprobs.ndim != 1 or logprobs.shape != reference_logprobs.shape or logprobs.shape != positions.shape:
        raise ValueError(
            f"logprobs {tuple(logprobs.shape)}, reference_logprobs {tuple(reference_logprobs.shape)} and positions "
            f"{tuple(positions.shape)} must all be (P,)"
        )
    if bool((positions < 0).any()):
        raise ValueError(f"positions count from 0 in each answer; the least is {int(positions.min())}")
    beta = betas(positions)
    gain = logprobs.float() - reference_logprobs.detach().float()
    return -(2 / beta * functional.logsigmoid(beta * gain)).mean()
