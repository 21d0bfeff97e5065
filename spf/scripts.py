"""Scripts that texts are written in: how refusals begin in one says nothing of how they begin in another."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from spf.shared_prefix import common

SHARE = 1 / 2
"""Of a prompt's letters: fewer are a name or a quotation."""

CALLED = {"Cjk": "Chinese"}


@cache
def script_of(letter: str) -> str:
    """The script of a letter, by its name in Unicode."""
    name = unicodedata.name(letter, "Unknown").split()[0].capitalize()
    return CALLED.get(name, name)


def unlike_scripts(prompts: Sequence[Sequence[int]], refusals: Sequence[Sequence[int]], tokenizer: Any) -> Counter[str]:
    """How many prompts (token ids) are in a script that no refusal (token ids) has, by its name.

    Languages of one script are not told apart. What all prompts begin and end with is the template's.
    """
    known = set(_letters(" ".join(_text(tokenizer, refusal) for refusal in refusals)))
    several = len(prompts) > 1
    before, behind = (common(all_of) if several else 0 for all_of in (prompts, [prompt[::-1] for prompt in prompts]))
    found: Counter[str] = Counter()
    for prompt in prompts if known else ():
        text = _text(tokenizer, prompt[before : len(prompt) - behind])
        if text.isascii() and "Latin" in known:
            continue
        letters = _letters(text)
        others = Counter({script: count for script, count in letters.items() if script not in known})
        if others.total() > SHARE * letters.total():
            found[others.most_common(1)[0][0]] += 1
    return found


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _letters(text: str) -> Counter[str]:
    return Counter(script_of(letter) for letter in text if letter.isalpha())
