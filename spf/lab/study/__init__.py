"""The mechanistic study (arXiv 2407.10264): a synthetic world, and measurements on any model."""
