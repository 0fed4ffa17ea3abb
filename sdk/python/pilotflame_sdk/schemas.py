"""JSON Schemas of dataclasses, msgspec structs and pydantic models, and values of these types."""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

PLAIN: Final[Mapping[object, Mapping[str, Any]]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    datetime: {"type": "string", "format": "date-time"},
    date: {"type": "string", "format": "date"},
}
_VALUES: Final = frozenset({"default", "examples", "enum", "const"})
"""Keywords whose values are no schemas."""
_OMITTED: Final = frozenset({"$ref", "$defs", "discriminator"})
"""Keywords that are written out, or that only generators of clients use."""
_UNIONS: Final = (Union, types.UnionType)


def schema_of(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - any type
    """Return the JSON Schema of a type: plain types, dataclasses, msgspec structs, pydantic models, enums,
    collections.

    Raises `TypeError` for a type that JSON can't hold; its text names the field.
    """
    if kind is Any or kind is object:
        return {}
    if isinstance(kind, type) and kind in PLAIN:
        return dict(PLAIN[kind])
    if dataclasses.is_dataclass(kind):
        return _dataclass_schema(kind)
    if _is_struct(kind):
        return _struct_schema(kind)
    if _is_model(kind):
        return _model_schema(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [one.value for one in kind]}
    return _generic_schema(kind)


def _generic_schema(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - any type
    """Return the JSON Schema of a collection, a union, a literal or an annotated type; raises `TypeError` for
    others.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        rules: dict[str, Any] = {}
        for one in arguments[1:]:
            rules |= {"description": one} if isinstance(one, str) else one if isinstance(one, dict) else {}
        return {**schema_of(arguments[0]), **rules}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in _UNIONS:
        return {"anyOf": [schema_of(one) for one in arguments]}
    if kind is list or kind is tuple or kind is set or origin in {list, set, frozenset, Sequence}:
        return {"type": "array", "items": schema_of(arguments[0])} if arguments else {"type": "array"}
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:  # noqa: PLR2004 - `tuple[T, ...]`
        return {"type": "array", "items": schema_of(arguments[0])}
    if kind is dict or origin in {dict, Mapping}:
        return {"type": "object", **({"additionalProperties": schema_of(arguments[1])} if arguments else {})}
    raise TypeError(f"{kind!r} has no JSON Schema: use dataclasses, lists, dicts and plain types")


def _dataclass_schema(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """Return the JSON Schema of a dataclass: an object without further properties."""
    hints = get_type_hints(kind, include_extras=True)
    properties, required = {}, []
    for field in dataclasses.fields(kind):
        try:
            found = {**schema_of(hints[field.name]), **field.metadata.get("schema", {})}
        except TypeError as error:
            raise TypeError(f"{kind.__name__}.{field.name}: {error}") from error
        if field.default is not dataclasses.MISSING:
            found["default"] = to_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found["default"] = to_json(field.default_factory())
        else:
            required.append(field.name)
        properties[field.name] = found
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def _struct_schema(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a msgspec struct
    """Return the JSON Schema of a msgspec struct without references, which allows no further fields."""
    import msgspec

    def custom_schema(custom: type) -> dict[str, Any]:
        if custom is object:
            return {"title": "JSON"}  # msgspec refuses an empty schema
        raise NotImplementedError

    try:
        schema = msgspec.json.schema(kind, schema_hook=custom_schema)
    except TypeError as error:
        annotations = {field.name: field.type for field in msgspec.structs.fields(kind)}
        raise _name_field(kind, annotations, error) from error
    return {"additionalProperties": False, **_write_out_all(schema)}


def _model_schema(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a pydantic model
    """Return the JSON Schema of a pydantic model without references."""
    try:
        schema = kind.model_json_schema()
    except (TypeError, RuntimeError) as error:
        annotations = {name: field.annotation for name, field in kind.model_fields.items()}
        raise _name_field(kind, annotations, error) from error
    return _write_out_all(schema)


def _name_field(kind: type, annotations: Mapping[str, Any], error: Exception) -> TypeError:
    """Return the error of the first field without a schema; `error` is that of the library, which names no field."""
    for name, annotation in annotations.items():
        try:
            schema_of(annotation)
        except TypeError as cause:  # noqa: PERF203 - the first error ends the loop
            return TypeError(f"{kind.__name__}.{name}: {cause}")
    return TypeError(f"{kind.__name__}: {error}")


def _write_out_all(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without references; raises `TypeError` for a class that contains itself."""
    found: dict[str, Any] = _write_out(schema, schema.get("$defs", {}))
    return found


def _write_out(value: Any, definitions: Mapping[str, Any], inside: tuple[str, ...] = ()) -> Any:  # noqa: ANN401 - any part of a schema
    """Return a schema with its references replaced by their definitions: a class may be a field of another one.

    Raises `TypeError` for a class that contains itself.
    """
    if isinstance(value, list):
        return [_write_out(one, definitions, inside) for one in value]
    if not isinstance(value, dict):
        return value
    written: dict[str, Any] = {}
    reference = value.get("$ref")
    if isinstance(reference, str):
        name = reference.rpartition("/")[2]
        if name in inside:
            raise TypeError(f"{name} contains itself: use dict[str, Any] for its fields of that type")
        written = _write_out(definitions[name], definitions, (*inside, name))
    for keyword, one in value.items():
        if keyword == "properties":
            written[keyword] = {name: _write_out(each, definitions, inside) for name, each in one.items()}
        elif keyword in _VALUES:
            written[keyword] = one
        elif keyword not in _OMITTED:
            written[keyword] = _write_out(one, definitions, inside)
    return written


def from_json(kind: Any, value: Any) -> Any:  # noqa: ANN401 - any type
    """Convert a JSON value to a value of a type, such as a dataclass; raises `ValueError` and `TypeError`.

    Any and None leave it unchanged.
    """
    if kind is Any or kind is None:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass_value(kind, value)
    if _is_struct(kind):
        import msgspec

        return msgspec.convert(value, kind)
    if _is_model(kind):
        return kind.model_validate(value)
    if kind is datetime:
        # Python 3.10 knows no Z.
        return datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    if kind is date:
        return date.fromisoformat(value)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    return _generic_value(kind, value)


def _generic_value(kind: Any, value: Any) -> Any:  # noqa: ANN401 - any type
    """Convert a JSON value to a collection, a union or an annotated type; other values stay unchanged."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return from_json(arguments[0], value)
    if origin in _UNIONS:
        return _union_value(arguments, value)
    if origin in {list, set, frozenset, tuple, Sequence} and isinstance(value, list):
        make = list if origin is Sequence else origin
        return make(from_json(arguments[0], one) for one in value)
    if origin in {dict, Mapping} and isinstance(value, dict):
        return {key: from_json(arguments[1], one) for key, one in value.items()}
    return float(value) if kind is float and isinstance(value, int) else value


def _union_value(kinds: Sequence[Any], value: Any) -> Any:  # noqa: ANN401 - any type
    """Convert a JSON value to the first type of a union that it fits; raises `ValueError` if it fits none."""
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if (
            isinstance(kind, type)
            and kind in PLAIN
            and isinstance(value, kind)
            and kind not in {datetime, date}
        ):
            return value
    for kind in kinds:
        if kind is not type(None):
            try:
                return from_json(kind, value)
            except (ValueError, TypeError, LookupError):
                continue
    raise ValueError(f"{value!r} fits none of the types")


def _dataclass_value(kind: type[Any], value: Any) -> Any:  # noqa: ANN401 - a dataclass
    """Build a dataclass from a JSON object; raises `TypeError` for other values and `ValueError` for unknown
    fields.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{kind.__name__} is made from an object, not from {type(value).__name__}")
    hints = get_type_hints(kind, include_extras=True)
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(set(value) - fields)
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
    return kind(**{name: from_json(hints[name], one) for name, one in value.items()})


def to_json(value: Any) -> Any:  # noqa: ANN401 - any value
    """Convert a value to JSON types: dataclasses, structs, models, enums, collections and dates.

    Values of unknown types stay, and are refused when they are encoded.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if _is_struct(type(value)):
        import msgspec

        return msgspec.to_builtins(value)
    if _is_model(type(value)):
        return value.model_dump(mode="json")
    if isinstance(value, enum.Enum):
        return to_json(value.value)
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(one) for one in value]
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    return value


def _is_struct(kind: Any) -> bool:  # noqa: ANN401 - any type
    """Return whether a type is a struct of msgspec, without importing msgspec."""
    # A struct exists only where its library is loaded; the SDK does not depend on it.
    library = sys.modules.get("msgspec")
    return library is not None and isinstance(kind, type) and issubclass(kind, library.Struct)


def _is_model(kind: Any) -> bool:  # noqa: ANN401 - any type
    """Return whether a type is a model of pydantic, without importing pydantic."""
    library = sys.modules.get("pydantic")
    return library is not None and isinstance(kind, type) and issubclass(kind, library.BaseModel)
