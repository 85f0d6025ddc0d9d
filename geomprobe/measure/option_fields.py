"""Options that are written once, as the fields of a dataclass.

Each field that `option` makes is an option of the command line, a keyword argument in Python and an entry of the
manifest. A command line that asks for the same again (for a segment of a replay, or in a report) comes from `argv`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from geomprobe.errors import UsageError


@dataclass(frozen=True)
class Option:
    """How a field of an `Options` class is written on the command line.

    Attributes:
        help: what it does, for ``--help`` and for docstrings.
        metavar: the name of its value in the help.
        parse: makes a value of a text; raises ``argparse.ArgumentTypeError`` where the text means nothing.
        text: makes the text of a value, which ``parse`` reads.
        flag: its name on the command line; made of the field's name when empty.
        constants: further flags, each with the value that it stands for and its help.
        excludes: options of one class that share this word exclude each other.
        lasting: whether it is a property of what the pass makes; False for how one attempt at the pass is run.
    """

    help: str
    metavar: str | None = None
    parse: Callable[[str], Any] = str
    text: Callable[[Any], str] = str
    flag: str = ""
    constants: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    excludes: str = ""
    lasting: bool = True


def option(default: Any, help: str, **details: Any) -> Any:
    """A field of an `Options` class; ``details`` are the other attributes of `Option`.

    A bool as the default makes a switch, a dict an option that may be repeated.
    """
    metadata = {"option": Option(help, **details)}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


Some = TypeVar("Some", bound="Options")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the options of a pass; each value goes through its option's own parser, wherever it comes from.

    Raises:
        UsageError: a value means nothing, or two options exclude each other.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Bake(Options):
    ...     minutes: int = option(20, "how long", metavar="N", parse=whole(1))
    ...     fan: bool = option(False, "with hot air")
    >>> Bake(minutes=30, fan=True).argv()
    ['--minutes', '30', '--fan']
    >>> Bake.parse(["--minutes", "30"])
    Bake(minutes=30, fan=False)
    >>> Bake.of(minute=3)
    Traceback (most recent call last):
    geomprobe.errors.UsageError: there is no option minute; the nearest is minutes
    """

    PURPOSE: ClassVar[str] = ""
    """What the pass does, such as ``"replay"``."""

    def __post_init__(self) -> None:
        for each, described in _written(self):
            object.__setattr__(self, each.name, _normal(each, described, getattr(self, each.name)))
        asked: dict[str, str] = {}
        for each, described in _written(self):
            if described.excludes and getattr(self, each.name) != _default(each):
                other = asked.setdefault(described.excludes, each.name)
                if other != each.name:
                    raise UsageError(f"{other} and {each.name} exclude each other: leave one of them out")

    @classmethod
    def of(cls: type[Some], **asked: Any) -> Some:
        """The options that keyword arguments ask for.

        Raises:
            UsageError: there is no such option, or it cannot have that value.
        """
        names = [each.name for each, _ in _written(cls)]
        for name in asked:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                rest = f"the nearest is {near[0]}" if near else f"there are {', '.join(names)}"
                raise UsageError(f"there is no option {name}{cls.PURPOSE and ' of '}{cls.PURPOSE}; {rest}")
        return cls(**asked)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> dict[str, Any]:
        """Declare every option to a parser; gives its groups of options that exclude each other."""
        groups: dict[str, Any] = {}
        for each, described in _written(cls):
            target: Any = parser
            if word := described.excludes or each.name * bool(described.constants):
                target = groups[word] = groups.get(word) or parser.add_mutually_exclusive_group()
            default = _default(each)
            # Only what is given shall be in the namespace: defaults are those of the fields.
            shared: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS}
            kind: dict[str, Any] = {"metavar": described.metavar, "type": described.parse}
            if default is False:
                kind = {"action": "store_true"}
            elif default is True:
                kind = {"action": argparse.BooleanOptionalAction}
            elif isinstance(default, dict):
                kind["action"] = "append"
            target.add_argument(_flag(each, described), **shared, **kind, help=_help(each, described))
            for flag, (value, help) in described.constants.items():
                target.add_argument(flag, **shared, action="store_const", const=value, help=help)
        return groups

    @classmethod
    def of_arguments(cls: type[Some], arguments: argparse.Namespace) -> Some:
        """The options in what a parser has read."""
        given = vars(arguments)
        return cls(**{each.name: given[each.name] for each, _ in _written(cls) if each.name in given})

    @classmethod
    def parse(cls: type[Some], argv: Sequence[str]) -> Some:
        """The options that a command line asks for; it holds nothing else."""
        parser = argparse.ArgumentParser(allow_abbrev=False)
        cls.add_arguments(parser)
        return cls.of_arguments(parser.parse_args(argv))

    def argv(self) -> list[str]:
        """The command line that asks for these options: what differs from the defaults."""
        words: list[str] = []
        for each, described in _written(self):
            value, flag = getattr(self, each.name), _flag(each, described)
            constants = [name for name, (constant, _) in described.constants.items() if constant == value]
            if value == _default(each):
                continue
            if constants:
                words.append(constants[0])
            elif isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, dict):
                words += [word for item in value.items() for word in (flag, described.text(item))]
            else:
                words += [flag, described.text(value)]
        return words

    def lasting(self: Some) -> Some:
        """These options without those of one attempt at the pass, such as ``force``."""
        passing = {each.name: _default(each) for each, described in _written(self) if not described.lasting}
        return replace(self, **passing)

    def asked(self) -> dict[str, Any]:
        """The lasting options that differ from their defaults, by name."""
        lasting = self.lasting()
        values = {each: getattr(lasting, each.name) for each, _ in _written(self)}
        return {each.name: value for each, value in values.items() if value != _default(each)}

    def described(self) -> dict[str, Any]:
        """For the manifest: the value of each lasting option, and the command line that asks for them."""
        lasting = {e.name: getattr(self, e.name) for e, described in _written(self) if described.lasting}
        return {**lasting, "argv": self.lasting().argv()}

    @classmethod
    def documented(cls) -> str:
        """An entry for each option, for the ``Args`` of a docstring."""
        entries = (f"{each.name}: {_help(each, described)}." for each, described in _written(cls))
        return "\n".join(
            textwrap.fill(entry, 112, initial_indent=" " * 8, subsequent_indent=" " * 12) for entry in entries
        )


def parser(make: Callable[[str], Any], valid: Callable[[Any], object], words: str) -> Callable[[str], Any]:
    """A parser for `Option`: what ``make`` makes of a text, where that is ``valid``; else an error, in these words."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = make(text)
            if valid(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} {words}")

    return parse


def whole(minimum: float = -math.inf) -> Callable[[str], int]:
    """A parser of whole numbers.

    >>> whole(1)("12")
    12
    """
    bound = f" of at least {minimum}" if minimum > -math.inf else ""
    return parser(int, lambda number: number >= minimum, f"is no whole number{bound}")


def _written(options: Options | type[Options]) -> Iterator[tuple[Field[Any], Option]]:
    return ((each, each.metadata["option"]) for each in fields(options))


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _flag(each: Field[Any], described: Option) -> str:
    return described.flag or "--" + each.name.replace("_", "-")


def _help(each: Field[Any], described: Option) -> str:
    """The help of an option, and its default where that says anything."""
    default = _default(each)
    if default is True:
        return f"{described.help} (default: yes)"
    return f"{described.help} (default: {described.text(default)})" if default else described.help


def _normal(each: Field[Any], described: Option, value: Any) -> Any:
    """A value as its option's parser gives it: a list or a range becomes a tuple, a path becomes absolute.

    Raises:
        UsageError: it is none that the parser takes.
    """
    default = _default(each)
    if isinstance(default, bool):
        return bool(value)
    if value is None and default is None:
        return None
    try:
        if isinstance(default, dict):
            return dict(described.parse(described.text(item)) for item in dict(value or {}).items())
        if isinstance(default, tuple) and not len(value):
            return default
        return described.parse(described.text(value))
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise UsageError(f"{each.name}={value!r}: {error}") from None
