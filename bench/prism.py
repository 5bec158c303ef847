"""ConceptPrism in the toy world: the four rows of its ablation, and its sweeps of beta and of the residuals' length.

Learns a target from five pictures with their captions as descriptions, draws the twelve prompts of the fidelity case
with the target in place of the noun, and "a photo of <residual i>" for every residual. The judge says how like the
target is, whether prompts were followed, and whether a residual's pictures hold the target (cosine above ``FOUND``) or
their picture's background. Every finished run is kept in results/prism.jsonl; an interrupted benchmark goes on there.
``nox -s bench -- prism [SEEDS] [CONCEPT ...]``
"""

import time

from demo import measure, world

from . import arms, toy

SETTINGS = {
    "steps": 240,
    "batch": 2,
    "learning_rate": 0.02,
    "beta": 0.05,
    "residual_vectors": 8,
    "anchors": 1,
    "null_bank": 16,
    "time_low": 0.5,
}
"""The range of the fidelity case. Two pictures with an anchor each, where the paper takes one with three: as
long a pass, and twice the pictures."""
RANDOM = {"residual_init": "random"}
METHODS = {
    "target only": {"residual_vectors": 0},
    "+ residual": {"beta": 0.0, **RANDOM},
    "+ exclusion": RANDOM,
    "+ initialisation": {},
    "beta 0.01": {"beta": 0.01, **RANDOM},
    "beta 0.07": {"beta": 0.07, **RANDOM},
    "beta 0.1": {"beta": 0.1, **RANDOM},
    "beta 0.5": {"beta": 0.5, **RANDOM},
    "length 1": {"residual_vectors": 1},
    "length 2": {"residual_vectors": 2},
    "length 4": {"residual_vectors": 4},
}
"""As in the paper, beta is swept without and the length with initialisation; 0 and 0.05, 0 and 8 are the first rows."""
VIEWS = 2
"""Pictures per residual."""
FOUND = 0.75
"""Cosine to the references above which the target counts as found. Renders of a concept have 0.83 and more, of
its plain look-alike 0.69 and less (five concepts, eight pictures each, against held-out references)."""
NAMES = [n for n in world.NOVEL if not world.NOVEL[n].scene.style]
"""Residuals are about what is behind an object, so not the style."""


def learned(parts, name: str, seed: int, changes: dict):
    """What is learned, and the residuals."""
    from concepts.host.learn_residual import ResidualSession, ResidualSettings

    settings = ResidualSettings("novel", seed=seed, init_text=world.NOVEL[name].word, **{**SETTINGS, **changes})
    session = ResidualSession(parts[0], parts[1], arms.concept_set(parts, name), settings)
    return arms.learned(session), session.residuals()


def measured(parts, eyes, name: str, seed: int, method: str) -> dict:
    """Fidelity and following per prompt, and per residual and view the target's cosine and the background."""
    begun = time.monotonic()
    done, residuals = learned(parts, name, seed, METHODS[method])
    learning = time.monotonic() - begun
    row = arms.drawn(parts, eyes, name, seed, "<novel>", done.concept)
    if residuals:
        views = [toy.prompt(parts, f"a photo of <{r.name}>", r) for r in residuals for _ in range(VIEWS)]
        pictures = toy.draw(parts, views, seed=1000 * (seed + 1) + 500)
        references, masks = arms.arrays(world.references(name, 8, seed=1))
        grounds = [{"background": s.background} for s in world.references(name, 5, 0) for _ in range(VIEWS)]
        row["in residuals"] = measure.fidelity(eyes, pictures, references, masks).tolist()
        row["grounds"] = measure.following(eyes, pictures, grounds).tolist()
    return row | {"learning": learning, "loss": [done.before, done.after]}


def table(rows: list[dict]) -> dict:
    """Method -> means and gains over the target alone."""
    found = [r | {"found": [v > FOUND for v in r["in residuals"]]} if "in residuals" in r else r for r in rows]
    keys = ("fidelity", "following", "in residuals", "found", "grounds")
    return arms.table(found, METHODS, keys, "target only", ("fidelity", "following"))


def main(options, rest) -> int:
    rows = arms.rows_of("prism", METHODS, NAMES, rest, measured)
    arms.report("prism", table(rows), settings=SETTINGS, methods=METHODS, found_above=FOUND)
    return 0
