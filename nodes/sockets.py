"""The pack's own socket types."""

from comfy_api.latest import io

Concept = io.Custom("CONCEPT")
ConceptSet = io.Custom("CONCEPT_SET")
Features = io.Custom("CONCEPT_FEATURES")
Dictionary = io.Custom("CONCEPT_DICTIONARY")
Codes = io.Custom("CONCEPT_CODES")


def named_concepts() -> io.Autogrow.Input:
    """Any number of concepts for a prompt's ``<name>``."""
    sockets = io.Autogrow.TemplatePrefix(
        Concept.Input("concept", tooltip="A concept; write its <name> in the prompt."), prefix="concept", min=0, max=50
    )
    return io.Autogrow.Input(
        "concepts", template=sockets, tooltip="Concepts that the prompt may name; sockets grow as you connect."
    )
