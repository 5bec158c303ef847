"""Pictures for TokenVerse's isolation loss (arXiv 2501.12224): they stand beside the concept's and must not change."""

from dataclasses import replace

from .class_pictures import draw_class
from .concept_set import ConceptSet
from .words import CAPTION, unmarked

HALVES = "A picture divided into two parts. The left part is {}. The right part is {}."
OTHERS = (
    *("a bowl of fruit on a table", "a lighthouse by the sea", "a bicycle against a wall", "a snowy mountain"),
    *("a street at night", "a sleeping cat", "an old book", "a hot air balloon", "a red car", "a field of sunflowers"),
    *("a cup of coffee", "a wooden chair", "a sailing boat", "a city skyline", "a dog in the park", "a waterfall"),
    *("a slice of cake", "a train station", "a garden with roses", "a stone bridge", "a clock on a shelf"),
    *("a desert with dunes", "a farm with a barn", "a guitar", "a bridge in the fog"),
)
"""What the pictures beside the concept's show when nobody says: as many as in the paper."""


def beside(prompts: str) -> list[str]:
    """What the other pictures show: the lines of ``prompts``, or ``OTHERS``."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    return [unmarked(line, CAPTION)[0] for line in lines] or list(OTHERS)


def check(data: ConceptSet, others: ConceptSet | None, prompts: str) -> None:
    """Raises: ValueError when pictures differ in size, or ``others`` are not one per line of ``prompts``."""
    shapes, lines = {tuple(v.shape) for v in data.latents}, beside(prompts)
    if len(shapes) > 1:
        raise ValueError(
            f"The isolation loss lays pictures side by side, and these have {len(shapes)} sizes; make them equal, "
            "or set isolation to 0."
        )
    if others is None:
        return
    if {tuple(v.shape) for v in others.latents} != shapes:
        raise ValueError("The pictures of isolation_set must be as large as those of concept_set.")
    if len(others.latents) != len(lines) or not prompts.strip():
        raise ValueError(
            f"isolation_set has {len(others.latents)} pictures and isolation_prompts {len(lines)} lines; "
            "write one line per picture, what it shows."
        )


def drawn(model, clip, data: ConceptSet, texts: list[str], seed: int) -> ConceptSet:
    """Pictures of ``texts``, as large as those of ``data``, by the model as the host left it."""
    made = [draw_class(model, clip, t, 1, data.latents[0], (seed + i) % 2**64) for i, t in enumerate(texts)]
    return replace(
        made[0],
        latents=tuple(m.latents[0] for m in made),
        masks=(None,) * len(made),
        captions=tuple((t,) for t in texts),
        mirrored=(False,) * len(made),
    )
