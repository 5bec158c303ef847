"""Likeness to novel concepts and prompt following: plain words, Textual Inversion with 1, 2, 4 vectors, Directional TI.

Learns every novel concept of the toy world from five pictures, draws twelve prompts that name background, position and
size, and lets the judge compare with eight references that were not learned from. Every finished run is kept in
results/fidelity.jsonl, so an interrupted benchmark goes on where it stopped.
``nox -s bench -- fidelity [SEEDS] [CONCEPT ...]``
"""

import json
import time

import numpy as np

from demo import judge as judging
from demo import measure, world

from . import toy
from .runner import RESULTS, machine

FILE = RESULTS / "fidelity.jsonl"
METHODS = {
    "plain words": None,
    "TI, 1 vector": {"vectors": 1},
    "TI, 2 vectors": {"vectors": 2},
    "TI, 4 vectors": {"vectors": 4},
    "Directional TI": {"vectors": 1, "geometry": "fixed norm"},
}
SETTINGS = {"steps": 240, "batch": 4, "learning_rate": 0.01}
RATES = {"fixed norm": 0.02}
PROMPTS, GAIN, KEPT = 12, 0.15, 0.85


def scenes_of(name: str) -> list[world.Scene]:
    """Twelve places that prompts name; backgrounds go round twice with other positions and sizes."""
    places = world.references(name, PROMPTS, seed=2)
    return [
        world.replace(s, position=world.POSITIONS[i % 3], size=world.SIZES[i // 3 % 2]) for i, s in enumerate(places)
    ]


def arrays(scenes: list[world.Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and masks, uint8."""
    drawn = [world.render(s) for s in scenes]
    return np.stack([world.pixels(p) for p, _ in drawn]), np.stack([world.pixels(m) for _, m in drawn])


def learned(parts, name: str, seed: int, changes: dict):
    """The concept, learned from the five pictures of seed 0."""
    import torch

    from concepts.host.concept_set import make_set
    from concepts.host.learn import learn
    from concepts.host.learn_tokens import TokenSession, TokenSettings

    novel, scenes = world.NOVEL[name], world.references(name, 5, 0)
    pictures, _ = arrays(scenes)
    settings = {**SETTINGS, **changes}
    if rate := RATES.get(settings.get("geometry")):
        settings["learning_rate"] = rate
    with torch.inference_mode():
        data = make_set(
            parts[2], [torch.from_numpy(pictures).float() / 255], [], [world.reference_caption(s, "{}") for s in scenes]
        )
        settings = TokenSettings("novel", seed=seed, init_text=novel.word, **settings)
        return learn(TokenSession(parts[0], parts[1], data, settings), preview_every=0, save_every=0)


def measured(parts, eyes, name: str, seed: int, method: str) -> dict:
    """One row: fidelity and following per picture."""
    novel, begun, done = world.NOVEL[name], time.monotonic(), None
    if METHODS[method] is not None:
        done = learned(parts, name, seed, METHODS[method])
    places = scenes_of(name)
    word = "<novel>" if done else novel.plain
    prompts = [toy.prompt(parts, world.reference_caption(s, word), *([done.concept] if done else [])) for s in places]
    pictures = toy.draw(parts, prompts, seed=1000 * (seed + 1))
    references, masks = arrays(world.references(name, 8, seed=1))
    wanted = [{f: getattr(s, f) for f in ("background", "position", "size")} for s in places]
    style = bool(novel.scene.style)
    return {
        "concept": name,
        "seed": seed,
        "method": method,
        "seconds": time.monotonic() - begun,
        "fidelity": measure.fidelity(eyes, pictures, references, None if style else masks).tolist(),
        "following": measure.following(eyes, pictures, wanted).tolist(),
        "loss": [done.before, done.after] if done else None,
    }


def table(rows: list[dict]) -> dict:
    """Method -> means with cluster-bootstrap intervals over concepts, and its differences to plain words."""
    plain = {(r["concept"], r["seed"]): r for r in rows if r["method"] == "plain words"}
    found = {}
    for method in METHODS:
        mine = [r for r in rows if r["method"] == method and (r["concept"], r["seed"]) in plain]
        if not mine:
            continue
        who = [r["concept"] for r in mine]
        base = [plain[r["concept"], r["seed"]] for r in mine]
        found[method] = {
            "runs": len(mine),
            "fidelity": measure.bootstrap([np.mean(r["fidelity"]) for r in mine], who),
            "gain": measure.bootstrap(
                [np.mean(r["fidelity"]) - np.mean(b["fidelity"]) for r, b in zip(mine, base, strict=True)], who
            ),
            "following": measure.bootstrap([np.mean(r["following"]) for r in mine], who),
            "following kept": float(
                np.mean([np.mean(r["following"]) for r in mine]) / np.mean([np.mean(b["following"]) for b in base])
            ),
            "seconds": float(np.median([r["seconds"] for r in mine])),
        }
    return found


def main(options, rest) -> int:
    seeds = int(rest[0]) if rest else 3
    names = rest[1:] or list(world.NOVEL)
    toy.host()
    parts, eyes = toy.load(), judging.load()
    RESULTS.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    done = {(r["concept"], r["seed"], r["method"]) for r in rows}
    for seed in range(seeds):
        for name in names:
            for method in METHODS:
                if (name, seed, method) in done:
                    continue
                rows.append(measured(parts, eyes, name, seed, method))
                with FILE.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(
                    f"{name} seed {seed} {method}: fidelity {np.mean(rows[-1]['fidelity']):.2f} "
                    f"following {np.mean(rows[-1]['following']):.2f} {rows[-1]['seconds']:.0f} s",
                    flush=True,
                )
    found = table(rows)
    print(f"{'method':16s} runs  fidelity            gain                following           kept  seconds")
    for method, r in found.items():
        spans = "  ".join(
            f"{m:.3f} ({low:.2f}..{high:.2f})" for m, low, high in (r["fidelity"], r["gain"], r["following"])
        )
        reached = r["gain"][0] >= GAIN and r["following kept"] >= KEPT
        print(
            f"{method:16s} {r['runs']:4d}  {spans}  {r['following kept']:.2f}  {r['seconds']:.0f}"
            f"{'  goal reached' if reached else ''}"
        )
    report = {
        "settings": SETTINGS,
        "rates": RATES,
        "goal": {"gain": GAIN, "following kept": KEPT},
        "table": found,
        "machine": machine(),
    }
    (RESULTS / "fidelity.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0
