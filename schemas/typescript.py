"""The contract of the viewer as TypeScript: python -m sae.schemas.typescript > viewer/src/schemas.ts."""

from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa
from pydantic import BaseModel

from sae.schemas import site, viewer

MODELS: Final[tuple[type[BaseModel], ...]] = (
    site.Entry,
    site.Site,
    site.Dictionary,
    site.Typed,
    site.Encoded,
    viewer.Sequence,
    viewer.AtomFile,
)
_SCALARS: Final = {"integer": "number", "number": "number", "string": "string", "boolean": "boolean", "null": "null"}


def _column(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_column(kind.value_type)}[]"
    return "string" if pa.types.is_string(kind) else "number"


def _row(name: str, schema: pa.Schema) -> Iterator[str]:
    yield f"/** {schema.metadata[b'grain'].decode()} */"
    yield f"export interface {name.capitalize()}Row {{"
    for field in schema:
        yield f"  {field.name}: {_column(field.type)}{' | null' if field.nullable else ''};"
    yield "}"


def _type(schema: dict[str, Any]) -> str:
    """The TypeScript type of a JSON schema of the kinds that pydantic makes of the contract's models."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_type(kind) for kind in schema["anyOf"]))
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(map(_type, schema['prefixItems']))}]"
        items = _type(schema["items"])
        return f"({items})[]" if "|" in items else f"{items}[]"
    if schema["type"] == "object":
        values = schema.get("additionalProperties") or next(iter(schema["patternProperties"].values()))
        return f"Record<string, {_type(values)}>"
    return _SCALARS[schema["type"]]


def _interface(model: type[BaseModel]) -> Iterator[str]:
    schema = model.model_json_schema(mode="validation")
    required = schema.get("required", ())
    yield f"/** {model.__doc__.strip().splitlines()[0] if model.__doc__ else model.__name__} */"
    yield f"export interface {model.__name__} {{"
    for name, field in schema["properties"].items():
        yield f"  {name}{'' if name in required else '?'}: {_type(field)};"
    yield "}"


def _lines() -> Iterator[str]:
    yield "// Made by python -m sae.schemas.typescript from schemas/site.py and schemas/viewer.py: edit those."
    yield f"export const FORMAT = {site.FORMAT};"
    yield f'export const EMBEDDED = "{site.EMBEDDED}";'
    for name, schema in site.FILES.items():
        yield from ("", *_row(name, schema))
    yield ""
    yield "export interface Rows {"
    yield from (f"  {name}: {name.capitalize()}Row;" for name in site.FILES)
    yield "}"
    yield ""
    yield "export const COLUMNS: { [T in keyof Rows]: readonly (keyof Rows[T])[] } = {"
    for name, schema in site.FILES.items():
        yield f"  {name}: ["
        yield from (f'    "{field}",' for field in schema.names)
        yield "  ],"
    yield "};"
    for model in MODELS:
        yield from ("", *_interface(model))


def typescript() -> str:
    """The source of viewer/src/schemas.ts: a row type for each file, its columns, and the JSON models."""
    return "\n".join(_lines()) + "\n"


if __name__ == "__main__":
    print(typescript(), end="")
