"""Step rules: each file owns its rules' settings, equations, steps and proofs. Importing one adds its rules."""

from spf.bases import Tokens
from spf.linalg import components, project_out_right, without_components
from spf.rules.base import RULES, Correction, Gate, Given, Rule, rule_of
from spf.rules.combining import Aggregate, Aggregator, DualAscent, Mix, Rank1, SafeGrad, conflict_coefficient
from spf.rules.constrained import Constrained
from spf.rules.constraint import null_space_violation
from spf.rules.null_space import LARGEST_DEFAULT_RANK, NullSpace, null_space_bases
from spf.rules.spf import SPF

# The default first, in help texts and messages.
RULES.update({name: RULES.pop(name) for name in ("null-space", "spf", *sorted(RULES.keys() - {"null-space", "spf"}))})

__all__ = [
    "LARGEST_DEFAULT_RANK",
    "RULES",
    "SPF",
    "Aggregate",
    "Aggregator",
    "Constrained",
    "Correction",
    "DualAscent",
    "Gate",
    "Given",
    "Mix",
    "NullSpace",
    "Rank1",
    "Rule",
    "SafeGrad",
    "Tokens",
    "components",
    "conflict_coefficient",
    "null_space_bases",
    "null_space_violation",
    "project_out_right",
    "rule_of",
    "without_components",
]
