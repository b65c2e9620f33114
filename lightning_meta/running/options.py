"""Options as a person types them: lists of numbers without brackets, and one line for a value that cannot be read."""

import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

from lightning_meta.errors import InputError

if TYPE_CHECKING:
    Numbers = list[float]
    Integers = list[int]
else:

    class Numbers(list):
        """An option's list of floats: ``10,20,30`` or ``[10, 20, 30]`` on the command line, a plain list in Python."""

    class Integers(list):
        """The same of whole numbers."""


def _read(kind: type, value: Any) -> list[Any]:
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        return [_number(kind, item) for item in items]
    except (TypeError, ValueError, OverflowError):
        shown, numbers = ",".join(map(str, items)), "numbers" if kind is float else "whole numbers"
        raise InputError(f"{shown!r} is not a list of {numbers}: separate them by commas, as in 10,20,30") from None


def _number(kind: type, item: Any) -> Any:
    if isinstance(item, bool) or not isinstance(item, (str, int, kind)):
        raise TypeError
    number = kind(item)
    if not math.isfinite(number):
        raise ValueError
    return number


for _type, _kind in ((Numbers, float), (Integers, int)):
    register_type(
        _type,
        serializer=list,
        deserializer=partial(_read, _kind),
        deserializer_exceptions=(),
        type_check=lambda value, _, kind=_kind: isinstance(value, list) and all(type(item) is kind for item in value),
    )


class OptionParser(LightningArgumentParser):
    """Lightning's parser, which says in one line what is wrong with an option and leaves out the list of all options.

    Pass it to the command line as ``parser_class``.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a class's own options: the outer one reports
            super().error(message, ex)
        self.exit(2, f"error: {one_line(message)}\n")


def one_line(message: str) -> str:
    """Shorten what jsonargparse says of a value: the option's whole name, then the innermost reasons."""
    names = re.findall(r'Parser key "(.+?)":', message)
    innermost = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", re.split(r'Parser key ".+?":', message)[-1])
    lines = [line.strip().removeprefix("- ").strip() for line in innermost.splitlines()]
    reasons = dict.fromkeys(line for line in lines if line and not line.startswith(_FRAME))
    if not names or not reasons:
        return " ".join(message.split())
    given = next((line for line in lines if line.startswith("Given value: ")), "")
    alone = all(reason.startswith("Expected a ") and "Got value" not in reason for reason in reasons)
    return f"{'.'.join(names)}: {'; '.join([*reasons, given] if alone else reasons)}"


_FRAME = "Does not validate", "Subtypes:", "Errors:", "Given value", "Problem with given", "Expected a NoneType"
