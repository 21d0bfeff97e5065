"""Published safety baselines, one file a method."""
