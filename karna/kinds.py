"""Types of arguments: how a word, or a JSON value, becomes what a function's annotation asks for.

A table, four forms that contain others (list, Literal, Union, Annotated), and every Enum; each kind
says in JSON Schema which values it takes. Imports nothing of ours; used by command.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

MAX_ITEMS = 10_000  # of a list of converted items, up to 2 microseconds each; `list` has no bound
MAX_NUMBER_DIGITS = 100  # int() takes quadratic time, and refuses more than 4,300 digits
MAX_EXACT_FLOAT = 2**53  # beyond it a float may be another number than was written

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}


class Kind(NamedTuple):
    """A type of argument; `convert` makes a word a value, and checks one from JSON.

    It raises ValueError with the words that follow the argument's name ("must be ...").
    `schema` admits what `convert` takes from JSON, in the form that is plainest to a caller (a
    number, not also its digits as text); None where JSON has no such value.
    is_text: it takes the rest of the command line as it was typed.
    """

    name: str
    convert: Callable[[Any], Any]
    nullable: bool = False
    choices: tuple[Any, ...] = ()
    schema: Schema | None = None
    is_text: bool = False


_AS_TYPED = "the rest of the command line, as it was typed"
Text = Annotated[str, _AS_TYPED]  # of a command's last parameter: no quotes are needed


def _exactly(problem: str, *kinds: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if type(value) not in kinds:  # exactly: bool is an int, and not meant here
            raise ValueError(problem)
        return value

    return convert


_DIGITS = re.compile("[+-]?[0-9]+")


def _whole_number(value: Any) -> int:
    if isinstance(value, str) and len(value) <= MAX_NUMBER_DIGITS:
        if (value.isdecimal() and value.isascii()) or _DIGITS.fullmatch(value):
            return int(value)
    elif type(value) is float and value.is_integer() and abs(value) <= MAX_EXACT_FLOAT:
        value = int(value)  # 1.0 is an integer to JSON Schema, and to who counts in floats
    if type(value) is not int:
        raise ValueError("must be a whole number")
    return value


def _finite(value: Any) -> float:
    try:
        if isinstance(value, str) and ("_" in value or len(value) > MAX_NUMBER_DIGITS):
            raise ValueError
        number = float(value) if type(value) in (str, int, float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


_BOOLS = {"true": True, "yes": True, "on": True, "1": True,
          "false": False, "no": False, "off": False, "0": False}  # fmt: skip


def _yes_or_no(value: Any) -> bool:
    answer = _BOOLS.get(value.lower()) if isinstance(value, str) else value
    if type(answer) is not bool:
        raise ValueError("must be true or false")
    return answer


ANY = Kind("any", lambda value: value, nullable=True, schema={})
KINDS: dict[Any, Kind] = {
    inspect.Parameter.empty: ANY,
    Any: ANY,
    object: ANY,
    str: Kind("str", _exactly("must be a text", str), schema={"type": "string"}),
    int: Kind("int", _whole_number, schema={"type": "integer"}),
    float: Kind("float", _finite, schema={"type": "number"}),
    bool: Kind("bool", _yes_or_no, schema={"type": "boolean"}),
    bytes: Kind("bytes", _exactly("must be bytes", bytes, bytearray)),
    list: Kind("list", _exactly("must be a list", list), schema={"type": "array"}),
    dict: Kind("dict", _exactly("must be an object", dict), schema={"type": "object"}),
}
TEXT = Kind("text", KINDS[str].convert, schema={"type": "string"}, is_text=True)


def kind_of(annotation: Any) -> Kind:
    """The Kind of an annotation; TypeError when no command could be given such a value."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _kind_of_literal(inner)
    if origin is Annotated:
        return TEXT if _AS_TYPED in inner[1:] else kind_of(inner[0])
    if origin in (Union, types.UnionType):
        return _kind_of_union(inner)
    if origin is list:
        return _kind_of_list(kind_of(inner[0]))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _kind_of_enum(annotation)
    try:
        return KINDS[origin or annotation]
    except (KeyError, TypeError):
        raise TypeError(f"{annotation!r} is no type of an argument: use str, int, float, bool, "
                        "bytes, list, dict, Literal, Enum, Optional or Any") from None  # fmt: skip


def _convert_items(item: Kind, value: Any) -> list[Any]:
    """Convert each item of a list from JSON."""
    items = KINDS[list].convert(value)
    inner = sum(len(each) for each in items[:MAX_ITEMS] if type(each) is list)
    if len(items) + inner > MAX_ITEMS:
        raise ValueError(f"must have at most {MAX_ITEMS} items")
    return list(map(item.convert, items))


def _kind_of_list(item: Kind) -> Kind:
    schema = None if item.schema is None else {"type": "array", "items": item.schema}
    convert = functools.partial(_convert_items, item)
    return Kind(f"list[{item.name}]", convert, schema=schema)


def _kind_of_literal(values: tuple[Any, ...]) -> Kind:
    choices = tuple(value for value in values if value is not None)
    words = {str(c).lower() if isinstance(c, bool) else str(c): c for c in choices}

    def convert(value: Any) -> Any:
        if any(type(value) is type(each) and value == each for each in values):  # 1 is not True
            return value
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return words[value]

    nullable = len(choices) < len(values)
    schema = _any_of([_schema_of_choices(choices)], nullable)
    return Kind(type(choices[0]).__name__, convert, nullable, choices, schema)


_JSON_TYPES = {str: "string", int: "integer", bool: "boolean"}  # of choices


def _schema_of_choices(choices: tuple[Any, ...]) -> Schema | None:
    """An enum, with its type where there is one: some clients take no other."""
    values = [choice for choice in choices if type(choice) in _JSON_TYPES]
    if not values:
        return None
    kinds = {type(value) for value in values}
    schema: Schema = {"type": _JSON_TYPES[kinds.pop()]} if len(kinds) == 1 else {}
    return {**schema, "enum": values}


def _any_of(schemas: list[Schema | None], nullable: bool) -> Schema | None:
    """What any of these admits, or null; None where that is nothing."""
    found = [schema for schema in schemas if schema is not None]
    if {} in found:
        return {}
    if nullable:
        found.append(NULL)
    return {"anyOf": found} if len(found) > 1 else found[0] if found else None


def without_null(schema: Schema) -> Schema:
    """The schema without the null that an Optional admits."""
    rest = [each for each in schema.get("anyOf", ()) if each is not NULL]
    return schema if not rest else rest[0] if len(rest) == 1 else {"anyOf": rest}


def word_of(member: Enum) -> str:
    """How a member is written: its value where that is a text, else its name."""
    return member.value if isinstance(member.value, str) else member.name


def _kind_of_enum(members: type[Enum]) -> Kind:
    """The members of an Enum: given by value, or by name where no value is the same."""
    if not members.__members__:
        raise TypeError(f"{members.__name__} has no members")
    by_value = {(type(each.value), each.value): each for each in members if _is_plain(each.value)}
    words = {str(value): member for (_, value), member in by_value.items()}
    words = {**members.__members__, **words}
    choices = tuple(dict.fromkeys(map(word_of, members)))

    def convert(value: Any) -> Any:
        found = words.get(value) if isinstance(value, str) else None
        if found is None and _is_plain(value):
            found = by_value.get((type(value), value))
        if found is None:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return found

    schema = _schema_of_choices(choices)
    return Kind(members.__name__, convert, choices=choices, schema=schema)


def _is_plain(value: Any) -> bool:
    """May a word or a JSON value stand for it?"""
    return type(value) in (str, int, float, bool)


def _kind_of_union(members: tuple[Any, ...]) -> Kind:
    kinds = [kind_of(member) for member in members if member is not type(None)]
    nullable = type(None) in members or any(kind.nullable for kind in kinds)

    def convert(value: Any) -> Any:
        if value is None and nullable:
            return None
        problems = []
        for kind in kinds:
            try:
                return kind.convert(value)
            except ValueError as problem:
                problems.append(str(problem))
        raise ValueError(" or ".join(problems))

    choices = tuple(choice for kind in kinds for choice in kind.choices)
    # What JSON can't hold is left out; null is told once, at the end.
    schema = _any_of([kind.schema for kind in kinds], type(None) in members)
    is_text = any(kind.is_text for kind in kinds)
    return Kind("|".join(kind.name for kind in kinds), convert, nullable, choices, schema, is_text)
