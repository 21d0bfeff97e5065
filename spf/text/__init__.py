"""What models say: generation, and whether an answer refuses. Knows nothing of training."""
