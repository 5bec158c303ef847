"""Methods over concepts and seeds in the toy world; every finished run is kept, so an interrupted benchmark goes on."""

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from demo import judge as judging
from demo import measure, world

from . import toy
from .runner import RESULTS, device, machine

PROMPTS = 12


@functools.cache
def parts():
    """(MODEL, CLIP, VAE) of the toy world, loaded once."""
    toy.host()
    return toy.load()


def arrays(scenes: list[world.Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and masks, uint8."""
    drawn = [world.render(s) for s in scenes]
    return np.stack([world.pixels(p) for p, _ in drawn]), np.stack([world.pixels(m) for _, m in drawn])


def scenes_of(name: str, count: int = PROMPTS) -> list[world.Scene]:
    """Places that prompts name; backgrounds go round with other positions and sizes."""
    places = world.references(name, count, seed=2)
    return [
        world.replace(s, position=world.POSITIONS[i % 3], size=world.SIZES[i // 3 % 2]) for i, s in enumerate(places)
    ]


def concept_set(parts, name: str, count: int = 5):
    """The pictures of seed 0 that a concept is learned from, with their captions."""
    import torch

    from concepts.host.concept_set import make_set

    scenes = world.references(name, count, 0)
    pictures, _ = arrays(scenes)
    with torch.inference_mode():
        return make_set(
            parts[2], [torch.from_numpy(pictures).float() / 255], [], [world.reference_caption(s, "{}") for s in scenes]
        )


def learned(session):
    """What a session learns, without previews and autosaves."""
    import torch

    from concepts.host.learn import learn

    with torch.inference_mode():
        return learn(session, preview_every=0, save_every=0)


def drawn(parts, eyes, name: str, seed: int, word: str, *concepts, model=None) -> dict:
    """Fidelity and following of the twelve prompts with ``word`` in the concept's place, per picture."""
    places = scenes_of(name)
    prompts = [toy.prompt(parts, world.reference_caption(s, word), *concepts) for s in places]
    pictures = toy.draw((model or parts[0], *parts[1:]), prompts, seed=1000 * (seed + 1))
    references, masks = arrays(world.references(name, 8, seed=1))
    wanted = [{f: getattr(s, f) for f in ("background", "position", "size")} for s in places]
    style = bool(world.NOVEL[name].scene.style)
    return {
        "fidelity": measure.fidelity(eyes, pictures, references, None if style else masks).tolist(),
        "following": measure.following(eyes, pictures, wanted).tolist(),
    }


def rows_of(
    case: str, methods: Iterable[str], names: list[str], rest: list[str], measured: Callable, weights: str = ""
) -> list[dict]:
    """All rows of results/<case>.jsonl that were measured on ``weights``, after the missing ones were.

    ``rest``: [SEEDS] [CONCEPT ...], by default three seeds and ``names``; ``measured(parts, eyes, name, seed, method)``
    gives a row's values; ``weights``: a name of the model's, where they have changed since other rows were measured.
    """
    file, seeds, names = RESULTS / f"{case}.jsonl", int(rest[0]) if rest else 3, rest[1:] or names
    loaded, eyes = parts(), judging.load()
    RESULTS.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = [r for r in rows if r.get("weights", "") == weights]
    done = {(r["concept"], r["seed"], r["method"]) for r in rows}
    wanted = [(name, seed, method) for seed in range(seeds) for method in methods for name in names]
    for name, seed, method in [w for w in wanted if w not in done]:
        begun = time.monotonic()
        row = {"concept": name, "seed": seed, "method": method, **measured(loaded, eyes, name, seed, method)}
        row |= {"weights": weights} if weights else {}
        rows.append({**row, "device": device(), "seconds": time.monotonic() - begun})
        with file.open("a") as kept:
            kept.write(json.dumps(rows[-1]) + "\n")
        values = " ".join(f"{k} {np.mean(v):.3f}" for k, v in row.items() if isinstance(v, list) and k != "loss")
        print(f"{name} seed {seed} {method}: {values}, {rows[-1]['seconds']:.0f} s", flush=True)
    return rows


def table(rows: list[dict], methods: Iterable[str], keys: Iterable[str], base: str, gains: Iterable[str]) -> dict:
    """Method -> runs, median seconds, means of ``keys`` and gains over ``base``, with cluster-bootstrap intervals.

    Only rows whose concept and seed ``base`` has too; keys that a method does not measure are left out.
    """
    first, found = {(r["concept"], r["seed"]): r for r in rows if r["method"] == base}, {}
    for method in methods:
        mine = [r for r in rows if r["method"] == method and (r["concept"], r["seed"]) in first]
        if not mine:
            continue
        who = [r["concept"] for r in mine]
        found[method] = {"runs": len(mine), "seconds": float(np.median([r["seconds"] for r in mine]))}
        found[method]["devices"] = dict(Counter(r["device"] for r in mine))
        for key in [k for k in keys if k in mine[0]]:
            values = [np.mean(r[key]) for r in mine]
            found[method][key] = measure.bootstrap(values, who)
            if key in gains:
                others = [np.mean(first[r["concept"], r["seed"]][key]) for r in mine]
                found[method][f"{key} gain"] = measure.bootstrap(np.subtract(values, others), who)
    return found


def report(case: str, found: dict, **facts) -> None:
    """Prints the table and writes results/<case>.json."""
    for method, row in found.items():
        spans = [f"{k} {v[0]:.3f} ({v[1]:.3f}..{v[2]:.3f})" for k, v in row.items() if isinstance(v, tuple)]
        print(f"{method:20s} {row['runs']:3d} runs  {'  '.join(spans)}  {row['seconds']:.0f} s")
    whole = {**facts, "table": found, "reported on": machine()}
    (RESULTS / f"{case}.json").write_text(json.dumps(whole, indent=1) + "\n")
