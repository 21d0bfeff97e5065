"""OSF: weights change only outside their large singular directions, by PEFT's orthogonal subspace fine-tuning.

Nayak et al., "Sculpting Subspaces" (arXiv 2504.07097): of W = U S V' the directions with large singular values, where
what was learned before is taken to be, stay as they are; the others are trained, their gradients projected off those
that stay. It takes the aligned weights alone, no refusals. PEFT projects gradients, not steps, so Adam's scaling
leads off the subspace again a little.
"""

from peft import OSFConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def add_osf(model: PreTrainedModel, preserved: float = 0.5) -> PeftModel:
    """The model with OSF on every linear layer; what it computes is unchanged, and is in float32 now.

    Args:
        preserved: share of the singular directions of each matrix that stay; PEFT's default is half.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    if not 0 < preserved < 1:
        raise ValueError(f"osf: preserved must lie between 0 and 1, not {preserved}")
    # PEFT would cast trainable parts of 16 bit weights after its projections were hooked to them, and lose these
    return get_peft_model(model.float(), OSFConfig(target_modules="all-linear", effective_rank=float(preserved)))
