"""The pack's own socket types."""

from comfy_api.latest import io

Concept = io.Custom("CONCEPT")
ConceptSet = io.Custom("CONCEPT_SET")
