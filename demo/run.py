"""The demo: learns a concept in a real headless ComfyUI, places it into four new scenes, measures it, draws a sheet.

``nox -s demo`` runs it; the graph is ``workflows/api/1_learn_a_concept_and_use_it.json``.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from . import judge as judging
from . import measure, world
from .server import PACK, Client, Server

GRAPH = PACK / "workflows" / "api" / "1_learn_a_concept_and_use_it.json"


def nodes_of(graph: dict, kind: str) -> list[str]:
    """Ids of all nodes of one class."""
    return [key for key, node in graph.items() if node["class_type"] == kind]


def source_of(graph: dict, key: str, name: str) -> str:
    """Id of the node that feeds an input."""
    return graph[key]["inputs"][name][0]


def wanted_in(text: str) -> dict[str, str]:
    """Factor -> value that a prompt of the toy world names."""
    words = text.replace(",", " ").split()
    found = {f: [w for w in words if w in values] for f, values in world.FACTORS.items()}
    return {f: hits[0] for f, hits in found.items() if hits and f in ("background", "position", "size")}


def sheet(rows: list[tuple[str, list[Image.Image]]], file: Path, cell: int = 144) -> None:
    """One labelled row of pictures per entry."""
    width = max(len(pictures) for _, pictures in rows) * (cell + 6) + 10
    page = Image.new("RGB", (width, len(rows) * (cell + 28) + 8), (252, 252, 252))
    draw = ImageDraw.Draw(page)
    for number, (label, pictures) in enumerate(rows):
        top = 6 + number * (cell + 28)
        draw.text((8, top + 4), label, fill=(20, 20, 20))
        for column, picture in enumerate(pictures):
            page.paste(picture.convert("RGB").resize((cell, cell), Image.LANCZOS), (8 + column * (cell + 6), top + 20))
    page.save(file)


def as_array(pictures: list[Image.Image]) -> np.ndarray:
    """PIL pictures -> uint8 [n, 128, 128, 3]."""
    return np.stack([np.asarray(p.convert("RGB")) for p in pictures])


def scores(graph: dict, scenes: list[Image.Image], prompts: list[str]) -> dict[str, float]:
    """Fidelity to held-out references, the same for the references' plain word, and prompt following."""
    eyes = judging.load()
    subject = graph[nodes_of(graph, "ConceptLoadToyReferences")[0]]["inputs"]["subject"]
    held = [world.render(s) for s in world.references(subject, 8, seed=1)]
    references, masks = as_array([p for p, _ in held]), np.stack([np.asarray(m) for _, m in held])
    plain = world.NOVEL[subject].scene
    word = world.Scene(shape=world.NOVEL[subject].word, colour=plain.colour, background="sand")
    ideal = as_array([world.render(word)[0]])
    pictures = as_array(scenes)
    return {
        "fidelity": float(measure.fidelity(eyes, pictures, references, masks).mean()),
        "fidelity of a perfect plain-word picture": float(measure.fidelity(eyes, ideal, references, masks).mean()),
        "fidelity of the references to each other": float(measure.fidelity(eyes, references, references, masks).mean()),
        "prompt following": float(np.nanmean(measure.following(eyes, pictures, [wanted_in(p) for p in prompts]))),
    }


def run(client: Client, graph: dict, out: Path, say=print) -> dict[str, float]:
    """Runs the graph, writes ``contact_sheet.png`` into ``out``, returns the scores.

    Raises: RuntimeError with the host's message when the graph fails.
    """
    learner, last = nodes_of(graph, "ConceptLearnTokens")[0], [0.0]

    def show(event):
        data = event["data"]
        if event["type"] == "progress" and str(data.get("node")) == learner and time.monotonic() - last[0] > 5:
            last[0] = time.monotonic()
            say(f"  learning: step {data['value']} of {data['max']}")

    result = client.queue(graph, on_event=show)
    if result["status"] != "success":
        raise RuntimeError(f"The demo graph ended with {result['status']}: {json.dumps(result['error'])[:2000]}")
    outputs = result["outputs"]

    def pictures(key: str) -> list[Image.Image]:
        return [client.image(ref) for ref in outputs[key]["images"]]

    saves = nodes_of(graph, "SaveImage")
    scenes = [pictures(key)[0] for key in saves]
    samplers = [source_of(graph, source_of(graph, key, "images"), "samples") for key in saves]
    prompts = [graph[source_of(graph, key, "positive")]["inputs"]["text"] for key in samplers]
    references = next(
        k
        for k in nodes_of(graph, "PreviewImage")
        if graph[source_of(graph, k, "images")]["class_type"] == "ConceptLoadToyReferences"
    )
    strip = next(
        k for k in nodes_of(graph, "PreviewImage") if graph[source_of(graph, k, "images")]["class_type"] == "VAEDecode"
    )
    say(outputs[learner]["text"][0])
    found = scores(graph, scenes, prompts)
    line = ", ".join(f"{name} {value:.2f}" for name, value in found.items() if " of " not in name)
    sheet(
        [
            ("learned from", pictures(references)),
            ("while it learned", pictures(strip)),
            (f"four new scenes: {line}", scenes),
        ],
        out / "contact_sheet.png",
    )
    return {**found, "seconds": result["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", type=Path, required=True, help="folder of a ComfyUI")
    parser.add_argument(
        "--out", type=Path, default=PACK / "out", help="where the contact sheet and the host's files go"
    )
    parser.add_argument("--subject", choices=list(world.NOVEL), default="cross-mug", help="the novel concept")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    graph = json.loads(GRAPH.read_text())
    graph[nodes_of(graph, "ConceptLoadToyReferences")[0]]["inputs"]["subject"] = options.subject
    graph[nodes_of(graph, "ConceptLearnTokens")[0]]["inputs"]["init_text"] = world.NOVEL[options.subject].word
    began = time.monotonic()
    with Server(options.host, options.out / "comfyui", args=("--preview-method", "auto")) as server:
        print(f"ComfyUI is up after {time.monotonic() - began:.1f} s")
        found = run(Client(server.url), graph, options.out)
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    print(f"contact sheet: {options.out / 'contact_sheet.png'}")


if __name__ == "__main__":
    sys.exit(main())
