"""SafetyLock: extract head directions from an aligned model once, apply them to any fine-tuned descendant."""

from spf.safetylock.extraction import extract, transfer_cosines
from spf.safetylock.lock import LockInfo, SafetyLock
from spf.safetylock.pairs import Pair, echoed, load_pairs, packaged_pairs, refusal_pairs
from spf.safetylock.saved import save_locked, unlock_saved
from spf.safetylock.tune import TunePoint, choose, plot_sweep, sweep

__all__ = [
    "LockInfo",
    "Pair",
    "SafetyLock",
    "TunePoint",
    "choose",
    "echoed",
    "extract",
    "load_pairs",
    "packaged_pairs",
    "plot_sweep",
    "refusal_pairs",
    "save_locked",
    "sweep",
    "transfer_cosines",
    "unlock_saved",
]
