"""Reward functions of TRL's kind for recipes/grpo.yaml: one number an answer."""

from typing import Any


def short(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """Shorter answers are better: 1 for none, 0 from 200 characters on."""
    return [max(0.0, 1 - len(answer[0]["content"]) / 200) for answer in completions]
