"""What several nodes' sockets and widgets have in common."""

from comfy_api.latest import io

Concept = io.Custom("CONCEPT")
ConceptSet = io.Custom("CONCEPT_SET")
Features = io.Custom("CONCEPT_FEATURES")
Dictionary = io.Custom("CONCEPT_DICTIONARY")
Codes = io.Custom("CONCEPT_CODES")
RATE = 1e-6
"""Step of a learning rate: ComfyUI's page rounds what is typed to as many decimals as the step has."""


def named_concepts() -> io.Autogrow.Input:
    """Any number of concepts for a prompt's ``<name>``."""
    sockets = io.Autogrow.TemplatePrefix(
        Concept.Input("concept", tooltip="A concept; write its <name> in the prompt."), prefix="concept", min=0, max=50
    )
    return io.Autogrow.Input(
        "concepts", template=sockets, tooltip="Concepts that the prompt may name; sockets grow as you connect."
    )


def connected(concepts: dict | None) -> list:
    """The concepts of ``named_concepts``, and behind them the words of each scene."""
    from ..carriers.scene import things  # not at every start

    given = [c for c in (concepts or {}).values() if c is not None]
    return given + [thing for c in given for thing in things(c)]


def told(texts: str | tuple[str, ...], *outputs) -> io.NodeOutput:
    """Outputs with a report: whole in the run's history, its first two lines on the node, which has no more room."""
    from ..host.progress import say  # not at every start

    texts = (texts,) if isinstance(texts, str) else texts
    say("\n".join("\n".join(texts).splitlines()[:2]))
    return io.NodeOutput(*outputs, ui={"text": texts})
