"""docs/openapi.yaml, and answers held to its schemas."""

from __future__ import annotations

from typing import Any

import jsonschema
import yaml

from tests.support.paths import ROOT

DOCUMENT: dict[str, Any] = yaml.safe_load(
    (ROOT / "docs" / "openapi.yaml").read_text(encoding="utf-8")
)


def validate(body: object, schema: str) -> None:
    """Raise ValidationError unless the body is as a named schema says."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole).validate(body)
