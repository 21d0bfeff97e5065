"""The errors that a user may meet; each message names what and where, and what to do."""


class SafetyDataError(ValueError):
    """Safety data that cannot be used; the message names the file and the row."""


class ChatError(ValueError):
    """Messages that a chat template or a tokenizer cannot render as they are."""


class UnsupportedModelError(ValueError):
    """A trainable parameter the safety rules cannot treat; the message names it."""


class UnsupportedSetupError(RuntimeError):
    """A launcher or optimizer the safety rules cannot act on; the message says what to change."""


class CorrectionError(RuntimeError):
    """The rule did not reach the parameters it should have, or it did nothing; what was trained is not protected."""


class RunFailedError(RuntimeError):
    """A command whose input was good and whose work did not succeed."""
