"""The errors that a user may meet; each message names what and where, and what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


def kind_of(value: object) -> str:
    """Its type, with the article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


INPUT_ERRORS = (SafetyDataError, ChatError, UnsupportedModelError, UnsupportedSetupError)
"""What is wrong with the input, also where it shows only when the work has begun."""


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """An interrupt, and a run that fails, say in a note what was kept and where: `kept` is asked then."""
    try:
        yield
    except (KeyboardInterrupt, RunFailedError) as error:
        if not getattr(error, "__notes__", ()):
            error.add_note(kept())
        raise


@contextmanager
def working() -> Iterator[None]:
    """The work of a command whose input was checked: an OSError or ValueError in it is no mistake in the input.

    Raises:
        RunFailedError: in their place.
    """
    try:
        yield
    except INPUT_ERRORS:
        raise
    except (OSError, ValueError) as error:
        raise RunFailedError(str(error) or type(error).__name__) from error
