"""LLaMA-Factory: its own training with a SafetyCallback, from its own YAML with one block more, `spf:`.

python -m spf.integrations.llama_factory my-training.yaml
torchrun --nproc_per_node 2 -m spf.integrations.llama_factory my-training.yaml
"""

import sys
from pathlib import Path
from typing import Any

from spf.config import read_yaml
from spf.named import callback_from

USAGE = "python -m spf.integrations.llama_factory TRAINING.yaml [name=value ...]"


def main(arguments: list[str]) -> None:
    """Train what the YAML file says; `name=value` overrides it, as in `llamafactory-cli train`.

    Raises:
        ValueError: no file is named, or a mistake in the block `spf:`.
    """
    if not arguments or Path(arguments[0]).suffix not in (".yaml", ".yml"):
        raise ValueError(f"name a YAML file of LLaMA-Factory: {USAGE}")
    settings: Any = read_yaml(Path(arguments[0])).get("spf") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{arguments[0]}: spf must hold names and values, not {settings!r}")
    callback = callback_from(settings)  # before LLaMA-Factory is imported, which takes long

    from llamafactory.hparams.parser import read_args
    from llamafactory.train.tuner import run_exp

    sys.argv[1:] = arguments
    given: Any = read_args()
    given.pop("spf", None)
    run_exp(given, callbacks=[callback] if callback else [])


if __name__ == "__main__":
    main(sys.argv[1:])
