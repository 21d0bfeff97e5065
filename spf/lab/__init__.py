"""Everything that is not needed to protect a run: baselines, the benchmark, the demo, the study, reports."""
