"""The OpenAPI 3.1 document, made from the rows of `Endpoint` and the types of the views: it cannot fall behind them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from meshd.api.endpoint import Endpoint, Rights

REFERENCES = "#/components/schemas/{name}"


class ErrorDetail(Struct, frozen=True):
    code: str
    message: str
    hint: str


class ErrorAnswer(Struct, frozen=True):
    error: ErrorDetail


def make_document(endpoints: Iterable[Endpoint], version: str) -> dict[str, Any]:
    endpoints = tuple(endpoints)
    kinds = [kind for row in endpoints for kind in (row.answer, row.body, row.event) if _is_struct(kind)]
    unique = list(dict.fromkeys([*kinds, ErrorAnswer]))
    schemas, components = msgspec.json.schema_components(unique, ref_template=REFERENCES)
    by_kind = dict(zip(unique, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for row in endpoints:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row, by_kind)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "meshd",
            "version": version,
            "description": "Any node of the mesh answers all of this. Fields are only ever added.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {
                "Error": {
                    "description": "What happened, to what, and what to try next",
                    "content": {"application/json": {"schema": by_kind[ErrorAnswer]}},
                }
            },
        },
    }


def _operation(row: Endpoint, by_kind: dict[Any, Any]) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", row.path)
    ]
    if row.query is not None:
        properties = msgspec.json.schema_components([row.query])[1][row.query.__name__]["properties"]
        for name, schema in properties.items():
            description = schema.pop("description", None)
            parameters.append(
                {"name": name, "in": "query", "schema": schema} | ({"description": description} if description else {})
            )
    answer: dict[str, Any] = {"description": row.summary}
    if row.answer is not None:
        answer["content"] = _content(row.answer, by_kind)
    if row.event is not None:
        # OpenAPI 3.1 has no word for the data of server-sent events; extensions begin with x-.
        answer["content"].setdefault("text/event-stream", {})["x-event-data"] = by_kind[row.event]
    operation: dict[str, Any] = {
        "operationId": _operation_id(row),
        "summary": row.summary,
        "tags": [row.path.split("/")[2]],
        "parameters": parameters,
        "responses": {str(row.status): answer, "default": {"$ref": "#/components/responses/Error"}},
        "security": [] if row.rights is Rights.ANYONE else [{"token": []}],
    }
    if row.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(row.body, by_kind)}
    if row.rights is not Rights.ANYONE:
        operation["description"] = f"Needs the role {row.rights.name.lower()}."
    return operation


def _operation_id(row: Endpoint) -> str:
    """`GET /v1/jobs/{job}/tasks` is get_jobs_tasks_of_job."""
    words = [row.method.lower(), *re.findall(r"/(\w+)", row.path)[1:]]
    names = re.findall(r"{(\w+)}", row.path)
    return "_".join(words) + ("_of_" + "_".join(names) if names else "")


def _content(kind: Any, by_kind: dict[Any, Any]) -> dict[str, Any]:
    if _is_struct(kind):
        return {"application/json": {"schema": by_kind[kind]}}
    return {kind: {"schema": {"type": "string"}}}


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)
