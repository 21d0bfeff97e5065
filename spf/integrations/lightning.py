"""Lightning: `Trainer(callbacks=[SafetyLightning(tokenizer, "refusals.jsonl")])`."""

from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from spf.data import read_as_refusals
from spf.errors import UnsupportedSetupError
from spf.optimizer import SafetyOptimizer
from spf.probe import SafetyProbe
from spf.rules import NullSpace, Rule
from spf.safety_samples import SafetySamples
from spf.text.generation import context_length, pad_id


class SafetyLightning(Callback):
    """Keeps the refusals of the model in a LightningModule's attribute `model`; `proven` says what was proven.

    The training data are not audited, as Lightning does not say what they are: run `spf audit` on them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        safety_data: str | Path | Dataset | None = None,
        rule: Rule | None = None,
        model: str = "model",
    ):
        """`safety_data` and `rule` as for SafetyCallback; model: where the LightningModule keeps the causal model."""
        self.tokenizer = tokenizer
        self.rule = rule or NullSpace()
        self.samples = SafetySamples(safety_data, self.rule, None, 0, None)
        self.model = model
        self.proven = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the optimizer; raises UnsupportedSetupError where the rule could not act."""
        strategy = trainer.strategy
        plain = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and trainer.scaler is None
        if not plain or not pl_module.automatic_optimization or len(strategy.optimizers) != 1 or trainer.global_step:
            raise UnsupportedSetupError(
                "SafetyLightning needs one device or DDP, no float16, automatic optimization, one optimizer, and a run "
                'from its beginning: use Trainer(strategy="ddp", precision="bf16-mixed") without ckpt_path, or '
                "SafetyCallback with the Trainer of transformers"
            )
        model: Any = pl_module.get_submodule(self.model)
        self.samples.choose(model, self.tokenizer)
        limit = context_length(model, self.tokenizer)
        anchors, reworded, calibration = self.samples.tokens(self.tokenizer, limit)
        optimizer = SafetyOptimizer(
            strategy.optimizers[0],
            SafetyProbe(model, anchors, pad_token_id=pad_id(self.tokenizer)),
            self.rule,
            reworded=reworded,
            further=self.samples.further(self.tokenizer, limit),
            reads=partial(read_as_refusals, model=model, tokenizer=self.tokenizer),
            calibration=calibration if self.rule.holds else (),
        )
        strategy.optimizers = [optimizer]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer: Any = trainer.strategy.optimizers[0]
        self.proven = optimizer.finish()
        optimizer.attachment.remove()
        for line in self.proven.splitlines():
            rank_zero_info(f"spf: {line}")
