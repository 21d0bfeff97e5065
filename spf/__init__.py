"""Keep an aligned language model's refusals while you fine-tune it."""

from spf.callback import SafetyCallback
from spf.errors import CorrectionError, SafetyDataError, UnsupportedModelError, UnsupportedSetupError
from spf.optimizer import SafetyOptimizer, attach
from spf.probe import SafetyProbe
from spf.rules import SPF, NullSpace, Rank1
from spf.subspace import SafetySubspace

__version__ = "0.1.0"

__all__ = [
    "SPF",
    "CorrectionError",
    "NullSpace",
    "Rank1",
    "SafetyCallback",
    "SafetyDataError",
    "SafetyOptimizer",
    "SafetyProbe",
    "SafetySubspace",
    "UnsupportedModelError",
    "UnsupportedSetupError",
    "attach",
]
