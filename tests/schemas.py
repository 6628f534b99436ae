"""JSON schemas of growing difficulty: some written by hand, the others drawn from a seed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

Schema = dict[str, Any]

WRITTEN: list[Schema] = [
    {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"enum": ["red", "green", 3, None, True]},
    {"const": {"a": [1, 2], "b": "é"}},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"type": "integer", "minimum": -5, "maximum": 17},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 1001},
    {"type": "number", "minimum": 0.25, "maximum": 2.5},
    {"type": ["string", "null"], "maxLength": 4},
    {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "string", "maxLength": 3}]},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}},
        "required": ["left", "right"],
        "additionalProperties": False,
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"value": {"type": "integer", "minimum": 0, "maximum": 99}},
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    {  # a list that refers to itself
        "$ref": "#/$defs/list",
        "$defs": {
            "list": {
                "anyOf": [
                    {"type": "null"},
                    {
                        "type": "object",
                        "properties": {"head": {"enum": ["x", "y"]}, "tail": {"$ref": "#/$defs/list"}},
                        "required": ["head", "tail"],
                        "additionalProperties": False,
                    },
                ]
            }
        },
    },
    {
        "type": "array",
        "items": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        "minItems": 1,
        "maxItems": 3,
    },
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "end"}], "items": False, "minItems": 2},
    {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 1, "maximum": 999}},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
    },
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"properties": {"b": {"type": "null"}}, "required": ["b"], "additionalProperties": True},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    {
        "type": "object",
        "patternProperties": {"^k[0-9]$": {"type": "integer", "minimum": 0, "maximum": 9}},
        "additionalProperties": False,
    },
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    {
        "type": "object",
        "title": "Order",
        "description": "as pydantic writes it",
        "properties": {
            "customer": {"title": "Customer", "type": "string", "minLength": 1, "maxLength": 6},
            "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}], "default": None},
            "items": {
                "type": "array",
                "minItems": 1,
                "maxItems": 2,
                "items": {
                    "type": "object",
                    "properties": {
                        "sku": {"type": "string", "pattern": "^[a-z]{3}$"},
                        "count": {"type": "integer", "exclusiveMinimum": 0, "maximum": 20},
                    },
                    "required": ["sku", "count"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["customer", "items"],
        "additionalProperties": False,
    },
]

_WORDS = ["name", "age", "price", "état", "tags", "in stock", "x-1", "note"]


def make_schemas(count: int, seed: int = 0) -> list[Schema]:
    """`count` schemas, those written by hand first; the others become larger."""
    random = np.random.default_rng(seed)
    drawn = [_with_ref(_draw(random, 1 + i * 3 // count), random) for i in range(count - len(WRITTEN))]
    return [*WRITTEN[:count], *drawn]


def _with_ref(schema: Schema, random: np.random.Generator) -> Schema:
    """The schema, and what it may refer to."""
    return {**schema, "$defs": {"it": _draw(random, 0)}} if '"$ref"' in json.dumps(schema) else schema


def _draw(random: np.random.Generator, depth: int) -> Schema:
    kinds = [_integer, _number, _string, _enum, _pattern, _one_of_types]
    if depth > 0:
        kinds = [_object, _array, _any_of, _referring] if random.random() < 0.8 else kinds
    return kinds[random.integers(len(kinds))](random, depth)


def _integer(random: np.random.Generator, depth: int) -> Schema:
    low = int(random.integers(-1000, 1000))
    return {"type": "integer", "minimum": low, "maximum": low + int(random.integers(0, 500))}


def _number(random: np.random.Generator, depth: int) -> Schema:
    low = float(np.round(random.normal() * 10, 2))
    return {"type": "number", "exclusiveMinimum": low, "maximum": low + float(random.integers(1, 9))}


def _string(random: np.random.Generator, depth: int) -> Schema:
    shortest = int(random.integers(0, 3))
    return {"type": "string", "minLength": shortest, "maxLength": shortest + int(random.integers(0, 5))}


def _enum(random: np.random.Generator, depth: int) -> Schema:
    values = ["", 'quoted "text"', "line\nbreak", "ünï", 0, -1.5, True, None, [1], {"a": 1}]
    return {"enum": [values[i] for i in random.permutation(len(values))[: random.integers(1, 6)]]}


def _pattern(random: np.random.Generator, depth: int) -> Schema:
    patterns = ["^a+b$", "^[0-9]{2,3}$", "^(yes|no)$", "^#[0-9a-f]{6}$", "^\\d{4}-\\d{2}$", "^[A-Z][a-z]{1,5}$"]
    return {"type": "string", "pattern": patterns[random.integers(len(patterns))]}


def _one_of_types(random: np.random.Generator, depth: int) -> Schema:
    return {"type": ["boolean", "null"]}


def _object(random: np.random.Generator, depth: int) -> Schema:
    names = [_WORDS[i] for i in random.permutation(len(_WORDS))[: random.integers(1, 5)]]
    extra = [False, False, {"type": "boolean"}][random.integers(3)]
    return {
        "type": "object",
        "properties": {name: _draw(random, depth - 1) for name in names},
        "required": [name for name in names if random.random() < 0.7],
        "additionalProperties": extra,
    }


def _array(random: np.random.Generator, depth: int) -> Schema:
    least = int(random.integers(0, 2))
    most = least + int(random.integers(1, 3))
    return {"type": "array", "items": _draw(random, depth - 1), "minItems": least, "maxItems": most}


def _any_of(random: np.random.Generator, depth: int) -> Schema:
    return {"anyOf": [_draw(random, depth - 1) for _ in range(random.integers(2, 4))]}


def _referring(random: np.random.Generator, depth: int) -> Schema:
    names = [_WORDS[i] for i in random.permutation(len(_WORDS))[:2]]
    return {
        "type": "object",
        "properties": {name: {"$ref": "#/$defs/it"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
