"""DER and DER++: the aligned model's logits replayed beside the training data.

Dark experience replay (Buzzega et al., arXiv 2004.07211), which Alssum et al., "Unforgotten Safety" (arXiv 2512.10150),
found the best of continual learning's methods for keeping a fine-tuned model safe:

    loss = NLL(training data) + alpha mean (z - z_0)^2 + beta NLL(replayed answers),

z and z_0 the logits of the tuned and of the aligned model on replayed answers (`replay.py`); beta 0 is DER. Here z_0 is
computed anew instead of stored: the aligned model is at hand and does not change.
"""

from torch import Tensor
from torch.nn import functional


def replay_loss(logits: Tensor, aligned_logits: Tensor, targets: Tensor, alpha: float, beta: float) -> Tensor:
    """What is added to the loss for replayed answer tokens; float32.

    Args:
        logits, aligned_logits: (P, V); no gradient flows into the aligned model's.
        targets: (P,) int64, the replayed tokens.

    Raises:
        ValueError: the shapes differ, or a weight is negative.
    """
    if logits.shape != aligned_logits.shape or logits.shape[:1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, aligned logits {tuple(aligned_logits.shape)} and targets "
            f"{tuple(targets.shape)} must be (P, V), (P, V) and (P,)"
        )
    if alpha < 0 or beta < 0:
        raise ValueError(f"the weights of DER must not be negative, and are {alpha} and {beta}")
    dark = functional.mse_loss(logits.float(), aligned_logits.detach().float())
    return alpha * dark + beta * functional.cross_entropy(logits.float(), targets)
