"""Nested frozen dataclasses as a strict schema: declared keys, checked values, overrides, a printed reference.

Unknown keys, wrong types and values out of range raise `InputError` with the nearest valid key or the allowed
range. Lists are tuples: `tuple[float, float]` has a fixed length, `tuple[str, ...]` any.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from .errors import Faults, InputError


def key(default: Any, doc: str, *, choices: tuple[str, ...] = (), within: str = "") -> Any:
    """Declare a key: `within` is an interval such as "(0, 1]", `choices` the words it may take."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "within": within})


def fill(schema: type, values: Mapping[str, Any]) -> Any:
    """An object of the dataclass `schema` from nested `values`, all checked.

    Raises:
        InputError: with a line per fault; what the schema says of several keys together is checked once each is right.
    """
    faults = Faults()
    filled = _fill(schema, values, "", schema, faults)
    faults.refuse()
    return filled


def read_yaml(file: Path) -> dict[str, Any]:
    """The `key: value` pairs of a YAML file, none of which may be given twice.

    Raises:
        InputError: naming the file, and the line of what is wrong.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _NoKeyTwice) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected `key: value` pairs, found {type(values).__name__}")
    return values


class _NoKeyTwice(yaml.SafeLoader):
    """As SafeLoader, which takes the last of several equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.value in lines:
                raise yaml.YAMLError(f"line {line}: {key_node.value} is given twice, first in line "
                                 f"{lines[key_node.value]}")
            lines[key_node.value] = line
        return super().construct_mapping(node, deep)


def override(schema: type, values: dict[str, Any], text: str) -> None:
    """Set in `values` what `text`, "key.path=value" with the value in YAML syntax, says."""
    path, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"override {text!r}: expected key.path=value, for example train.steps=100")
    annotations = {known: annotation for known, _, annotation in keys(schema)}
    if path not in annotations:
        raise InputError(_unknown(path, annotations))
    *sections, name = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"{section}: expected a section of keys, found {values!r}")
    keeps_text = str in _members(annotations[path]) and value not in ("", "null", "~")
    try:
        values[name] = value if keeps_text else yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"{path}={value!r}: not a valid value") from None


def keys(schema: type, prefix: str = "") -> list[tuple[str, dataclasses.Field, Any]]:
    """Every key's dotted path, declaration and type."""
    hints = typing.get_type_hints(schema)
    found = []
    for entry in dataclasses.fields(schema):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            found += keys(typing.cast(type, hint), f"{prefix}{entry.name}.")
        else:
            found.append((f"{prefix}{entry.name}", entry, hint))
    return found


def reference(schema: type) -> str:
    """Every key with its type, default, range and meaning, as text for `--help`."""
    lines: list[str] = []
    for path, entry, annotation in keys(schema):
        limits = entry.metadata["within"] or " | ".join(entry.metadata["choices"])
        lines.append(f"  {path}={_yaml(entry.default)}   {_type_name(annotation)}{', ' + limits if limits else ''}")
        lines.append(f"      {entry.metadata['doc']}")
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """`value` with its tuples as lists, as YAML and JSON hold them."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _fill(cls: type, values: Mapping[str, Any], prefix: str, schema: type, faults: Faults) -> Any:
    """An object, or None where a fault was added to `faults`."""
    before = len(faults.lines)
    hints = typing.get_type_hints(cls)
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    filled: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in known:
            faults.lines.append(_unknown(path, [key_path for key_path, _, _ in keys(schema)]))
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                filled[name] = _fill(hints[name], value, f"{path}.", schema, faults)
            else:
                faults.lines.append(f"{path}: expected a section of keys, found {value!r}")
        else:
            with faults.caught():
                filled[name] = _check(path, value, hints[name], known[name].metadata)
    for name, hint in hints.items():
        if name not in filled and dataclasses.is_dataclass(hint):
            filled[name] = _fill(typing.cast(type, hint), {}, f"{prefix}{name}.", schema, faults)
    if len(faults.lines) == before:
        with faults.caught():
            return cls(**filled)
    return None


def _check(path: str, value: Any, annotation: Any, metadata: Mapping[str, Any]) -> Any:
    """`value` coerced to the declared type and inside the declared range."""
    if value is False and "no" in metadata["choices"]:  # so YAML reads the word
        value = "no"
    value = _coerce(path, value, annotation)
    if value is None:
        return None
    if metadata["choices"] and value not in metadata["choices"]:
        near = difflib.get_close_matches(str(value), metadata["choices"], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{path}={value!r}: choose one of {', '.join(metadata['choices'])}{hint}")
    for number in value if isinstance(value, tuple) else (value,):
        if metadata["within"] and not _inside(number, metadata["within"]):
            raise InputError(f"{path}={value!r} is out of range: choose a value in {metadata['within']}")
    return value


def _coerce(path: str, value: Any, annotation: Any) -> Any:
    kinds = _members(annotation)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            parts = typing.get_args(kind)
            if parts[1:] == (...,):
                parts = parts[:1] * len(value)
            if len(parts) == len(value):
                return tuple(_coerce(path, part, wanted) for part, wanted in zip(value, parts, strict=True))
        if kind is bool and isinstance(value, bool):
            return value
        if kind is str and isinstance(value, str):
            return value
        if kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, float, str)):
            try:
                number = float(value)
            except ValueError:
                continue
            if kind is float and not math.isnan(number):
                return number
            if kind is int and number.is_integer():
                return int(value) if isinstance(value, int) else int(number)
    raise InputError(f"{path}={value!r} has the wrong type: expected {_type_name(annotation)}")


def _inside(number: float, within: str) -> bool:
    low, high = (float(bound) for bound in within[1:-1].split(","))
    above = number >= low if within[0] == "[" else number > low
    below = number <= high if within[-1] == "]" else number < high
    return above and below


def _unknown(path: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(path, known, 1, cutoff=0)
    by_leaf = [name for name in known if name.split(".")[-1] == path.split(".")[-1]]
    return f"unknown key {path!r}: did you mean {(by_leaf or near)[0]!r}?"


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _type_name(annotation: Any) -> str:
    names = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}

    def name(kind: Any) -> str:
        if kind in names:
            return names[kind]
        parts = typing.get_args(kind)
        return f"a list of {names[parts[0]]}s" if parts[1:] == (...,) else f"a list of {len(parts)} numbers"
    return " or ".join(name(kind) for kind in _members(annotation))


def _yaml(value: Any) -> str:
    if isinstance(value, (bool, type(None))):
        return {True: "true", False: "false", None: "null"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
