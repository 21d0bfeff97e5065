"""axolotl: a plugin with one block of YAML, `spf:`.

plugins: [spf.integrations.axolotl.SafetyPlugin]
spf: {data: refusals.jsonl}
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback

from spf.named import callback_from


class SafetyArgs(BaseModel):
    """What the plugin adds to axolotl's YAML: the names of `spf train` without `safety_`."""

    spf: dict[str, Any] | None = None


class SafetyPlugin(BasePlugin):
    """Gives axolotl's trainer a SafetyCallback."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SafetyArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        """Those of the trainer's constructor: only there the callback may drop rows of the data, and ends with the run.

        Raises:
            ValueError: a mistake in the block `spf:`.
        """
        callback = callback_from(dict(cfg.spf or {}))
        return [] if callback is None else [callback]
