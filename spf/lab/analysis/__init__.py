"""Measurements on gradients and weights: functions of tensors, for any model."""
