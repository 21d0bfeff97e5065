"""KL to the aligned model as a penalty on fine-tuning.

The aligned model is the teacher, on the very tokens that are trained on: Li & Hoiem, "Learning without
Forgetting" (arXiv 1606.09282), with the distillation loss of Hinton et al. (arXiv 1503.02531) at
temperature 1.
"""

from torch import Tensor
from torch.nn import functional


def kl_to_aligned(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(aligned || tuned) in nats, the mean over positions.

    This direction (distillation's) weighs the log-ratio by the aligned model's probabilities, so it grows
    without bound where the tuned model gives up a token that the aligned model would say, such as the
    start of a refusal. The other direction lets the tuned model give up all but one of them cheaply.

    Args:
        logits: (P, V), the tuned model's.
        reference_logits: (P, V), the aligned model's; no gradient flows into them.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.ndim != 2 or logits.shape != reference_logits.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and reference logits {tuple(reference_logits.shape)} must both be (P, V)"
        )
    return functional.kl_div(
        logits.float().log_softmax(-1),
        reference_logits.detach().float().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


def loss(logits: Tensor, reference_logits: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Mean NLL of the targets (P,), int64, plus `weight` times `kl_to_aligned`; float32, nats.

    Raises:
        ValueError: the shapes differ, or the weight is negative.
    """
    if weight < 0:
        raise ValueError(f"the weight of the KL term must not be negative, and is {weight}")
    return functional.cross_entropy(logits.float(), targets) + weight * kl_to_aligned(logits, reference_logits)
