"""Moved to spf.lab.baselines; this name works for one release."""

import spf.lab.baselines

__path__ = spf.lab.baselines.__path__
