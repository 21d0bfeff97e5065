"""Moved to spf.lab.analysis; this name works for one release."""

import spf.lab.analysis

__path__ = spf.lab.analysis.__path__
