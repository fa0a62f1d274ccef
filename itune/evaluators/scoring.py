"""Which function says whether an answer is right: one that is named here, or the user's own."""

from __future__ import annotations

import importlib
import inspect
import string
from collections.abc import Callable, Mapping
from typing import Any

from itune.evaluators import constraints, maths, rouge
from itune.types import InputError

Checker = Callable[[Mapping[str, Any], str], bool | float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(item: Mapping[str, Any], answer: str) -> bool:
    """The answer is the item's reference, white space at both ends aside."""
    return answer.strip() == item["reference"].strip()


def normalized(item: Mapping[str, Any], answer: str) -> bool:
    """The same in lower case, without ASCII punctuation, runs of white space as one (Tk-Instruct's exact match)."""
    return _normal(answer) == _normal(item["reference"])


def contains(item: Mapping[str, Any], answer: str) -> bool:
    """The normalized reference stands in the normalized answer as whole words."""
    wanted = _normal(item["reference"])
    return bool(wanted) and f" {wanted} " in f" {_normal(answer)} "


def _normal(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


NAMED: dict[str, Checker] = {
    "exact": exact, "normalized": normalized, "contains": contains, "rouge_l": rouge.score, "maths": maths.score,
    "constraints": constraints.score, "constraints_loose": constraints.loose,
}  # fmt: skip


def find_checker(name: str) -> Checker:
    """The checker of this name: one of `NAMED`, or `package.module:function` with arguments (item, answer).

    `item` has prompt, messages, reference, metadata and address; a checker returns a truth value or a score in [0, 1].
    A dotted name imports the user's own module, so it comes from the config, never from a data file. Raises InputError
    naming what is missing.
    """
    if name in NAMED:
        return NAMED[name]
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        known = " nor ".join(NAMED)
        raise InputError(f"eval.score: {name!r} is neither {known} nor of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"eval.score: cannot import {module_name!r} of {name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise InputError(f"eval.score: {module_name} has no function {function_name!r}; it has {', '.join(public)}")
    try:
        inspect.signature(function).bind({}, "")
    except TypeError as error:
        raise InputError(f"eval.score: {name} must take (item, answer): {error}") from error
    return function
