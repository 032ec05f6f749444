"""The JSON Schema of the spec, generated from the model and checked in (job.schema.json); a test keeps them equal."""

from __future__ import annotations

import json
from pathlib import Path

SCHEMA_FILE = Path(__file__).with_name("job.schema.json")


def spec_schema_text() -> str:
    """The schema as it is checked in: JSON Schema 2020-12, two spaces, one newline at the end."""
    from dropforge.spec import Spec

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()}
    schema["title"] = "Dropforge job spec, version 1"
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
