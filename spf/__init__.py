"""Keep an aligned language model's refusals while you fine-tune it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spf.callback import SafetyCallback
    from spf.errors import (
        ChatError,
        CorrectionError,
        RunFailedError,
        SafetyDataError,
        UnsupportedModelError,
        UnsupportedSetupError,
    )
    from spf.optimizer import SafetyOptimizer, attach
    from spf.probe import SafetyProbe
    from spf.rules import SPF, Aggregate, Constrained, DualAscent, Mix, NullSpace, Rank1, SafeGrad
    from spf.subspace import SafetySubspace

__version__ = "0.2.0"

__all__ = [
    "SPF",
    "Aggregate",
    "ChatError",
    "Constrained",
    "CorrectionError",
    "DualAscent",
    "Mix",
    "NullSpace",
    "Rank1",
    "RunFailedError",
    "SafeGrad",
    "SafetyCallback",
    "SafetyDataError",
    "SafetyOptimizer",
    "SafetyProbe",
    "SafetySubspace",
    "UnsupportedModelError",
    "UnsupportedSetupError",
    "attach",
]

_MODULES = {
    "SafetyCallback": "callback",
    "ChatError": "errors",
    "CorrectionError": "errors",
    "RunFailedError": "errors",
    "SafetyDataError": "errors",
    "UnsupportedModelError": "errors",
    "UnsupportedSetupError": "errors",
    "SafetyOptimizer": "optimizer",
    "attach": "optimizer",
    "SafetyProbe": "probe",
    **dict.fromkeys(
        ("SPF", "Aggregate", "Constrained", "DualAscent", "Mix", "NullSpace", "Rank1", "SafeGrad"), "rules"
    ),
    "SafetySubspace": "subspace",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch and transformers take seconds, which `spf --help` need not wait for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"spf.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
