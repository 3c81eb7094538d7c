"""The fields by which clients ask for a form: OpenAI's ``response_format``, and vLLM's ``structured_outputs``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from infer.constraint import Constraint
from infer.server.body import Body
from infer.server.errors import invalid

__all__ = ["JsonSchema", "ResponseFormat", "StructuredOutputs", "constraint_of", "of_schema"]

LONGEST = 1 << 18
Text = Annotated[str, Field(min_length=1, max_length=LONGEST)]


class JsonSchema(Body):
    """A schema with its name; it is always kept, strict or not."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """As OpenAI has it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _one(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            message = "response_format: json_schema belongs to the type json_schema, and only to it"
            raise invalid(message, "response_format")
        return self

    def constraint(self) -> Constraint | None:
        """The same for the engine."""
        if self.json_schema is not None:
            return of_schema(self.json_schema.schema_, "response_format")
        return Constraint("json", '{"type": "object"}') if self.type == "json_object" else None


class StructuredOutputs(Body):
    """As vLLM has it: one of these."""

    json_: dict[str, Any] | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=4096)] | None = None
    grammar: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(own is not None for own in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise invalid("structured_outputs: give one of json, regex, choice, grammar", "structured_outputs")
        return self

    def constraint(self) -> Constraint:
        """The same for the engine."""
        if self.json_ is not None:
            own, field = self.json_, "structured_outputs"
            return Constraint("json", own) if isinstance(own, str) else of_schema(own, field)
        if self.choice is not None:
            return Constraint("choice", json.dumps(self.choice))
        if self.regex is not None:
            return Constraint("regex", self.regex)
        return Constraint("grammar", self.grammar or "")


def of_schema(schema: dict[str, Any], field: str) -> Constraint:
    """A text that a JSON schema describes.

    Raises:
        ApiError: it is longer than any that is compiled.
    """
    text = json.dumps(schema)
    if len(text) > LONGEST:
        raise invalid(f"{field}: a schema of {len(text)} characters; at most {LONGEST} are compiled", field)
    return Constraint("json", text)


def constraint_of(format: ResponseFormat | None, outputs: StructuredOutputs | None) -> Constraint | None:
    """What the two fields of a body ask for.

    Raises:
        ApiError: two different things.
    """
    asked = None if format is None else format.constraint()
    if outputs is None:
        return asked
    if asked is not None:
        raise invalid("structured_outputs and response_format: give one of them", "structured_outputs")
    return outputs.constraint()
