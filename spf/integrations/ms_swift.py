"""ms-swift: a name for `--callbacks`, put there by a plugin file of the user's.

from spf.integrations.ms_swift import register
register(data="refusals.jsonl")
"""

from typing import Any

from transformers import TrainerCallback

from spf.named import callback_from

NAME = "spf"


def register(**settings: Any) -> None:
    """Make `--callbacks spf` a SafetyCallback; the settings have the names of `spf train` without `safety_`.

    Raises:
        ValueError: a mistake in them.
    """
    callback_from(settings)  # a mistake shows here, before the model is loaded
    from swift.callbacks import callbacks_map  # whoever imports this file has it, but for our own tests

    def made(args: Any, trainer: Any) -> TrainerCallback:
        """ms-swift makes its callbacks inside the trainer's constructor."""
        return callback_from(settings) or TrainerCallback()

    callbacks_map[NAME] = made
