"""Words of one picture that were learned together, in one concept of kind ``tokens`` (Break-A-Scene, arXiv 2305.16311).

Its rows are those of all things, one after the other, so its file is a stock embedding that names them all.
"""

from .concept import Concept

KEPT = ("architecture", "base", "clip", "encoders")


def things(concept: Concept) -> list[Concept]:
    """The words of a scene as concepts of their own, ``<name1>``, ``<name2>``, ...; none of any other concept.

    Raises: CarrierError for a scene whose name is too long to be numbered.
    """
    words = concept.info.get("things") if concept.kind == "tokens" else None
    if not isinstance(words, list) or not words or any(v.shape[3] % len(words) for v in concept.tensors.values()):
        return []
    facts = {k: concept.info[k] for k in KEPT if k in concept.info}
    parts = {key: value.chunk(len(words), dim=3) for key, value in concept.tensors.items()}
    return [
        Concept(
            f"{concept.name}{number + 1}",
            "tokens",
            {key: own[number] for key, own in parts.items()},
            {**facts, "init_text": word, "scene": concept.name},
        )
        for number, word in enumerate(words)
    ]
