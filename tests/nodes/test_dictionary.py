"""Train, look inside, prune, steer in a real server: on the toy world, with stock nodes around it."""

import json
from pathlib import Path

import numpy as np
import pytest

API = Path(__file__).resolve().parents[2] / "workflows" / "api"


def graph(which: str) -> dict:
    made = json.loads(next(API.glob(f"{which}_*.json")).read_text())
    for node in made.values():
        if node["class_type"] == "ConceptTrainDictionary":
            node["inputs"] |= {"steps": 40, "name": "served"}
    return made


def keys(made: dict, kind: str) -> list[str]:
    return [k for k, n in made.items() if n["class_type"] == kind]


def run(client, made: dict) -> dict:
    result = client.queue(made)
    assert result["status"] == "success", (result["error"] or {}).get("exception_message", result["error"])
    return result["outputs"]


def trained(made: dict) -> dict:
    """The part of a graph that trains."""
    return {k: made[k] for kind in ("ConceptLoadToyWorld", "ConceptTrainDictionary") for k in keys(made, kind)}


@pytest.mark.slow
def test_trained_loaded_and_continued(client, server):
    made = trained(graph("13"))
    (learner,) = keys(made, "ConceptTrainDictionary")
    text = run(client, made)[learner]["text"][0]
    assert "40 steps" in text and "FVU" in text and "saved: output/dictionaries/served" in text
    file = text.split("saved: output/dictionaries/")[1].splitlines()[0]
    assert (server.folder("output") / "dictionaries" / file).exists()
    made["load"] = {"class_type": "ConceptLoadDictionary", "inputs": {"file": file, "k": 0}}
    made[learner]["inputs"] |= {"continue_from": ["load", 0], "steps": 10}
    assert "50 steps" in run(client, made)[learner]["text"][0]


def test_files_outside_the_list_are_refused(client):
    made = trained(graph("13"))
    (learner,) = keys(made, "ConceptTrainDictionary")
    for file in ("../secret.safetensors", "/etc/passwd", "gone.safetensors"):
        made["load"] = {"class_type": "ConceptLoadDictionary", "inputs": {"file": file, "k": 0}}
        made[learner]["inputs"]["continue_from"] = ["load", 0]
        result = client.queue(made)
        assert result["status"] == "invalid" and "load" in result["error"]["node_errors"]


@pytest.mark.slow
def test_pruned_by_gradient_and_steered(client):
    """The gradient wants pictures; steering by 0 draws the stock picture, by much another one."""
    made = trained(graph("13"))
    (world,), (learner,) = (keys(made, k) for k in ("ConceptLoadToyWorld", "ConceptTrainDictionary"))
    text = "a photo of a red mug, sand background"
    made |= {
        "pictures": {
            "class_type": "ConceptLoadToyReferences",
            "inputs": {"subject": "cross-mug", "count": 2, "seed": 0},
        },
        "set": {
            "class_type": "ConceptMakeSet",
            "inputs": {"images": ["pictures", 0], "captions": ["pictures", 2], "vae": [world, 2]}
            | {"template": "object", "resolution": 0, "mirror": False},
        },
        "words": {
            "class_type": "ConceptEncodeWords",
            "inputs": {"clip": [world, 1], "dictionary": [learner, 0], "text": text, "words": "red, mug", "shown": 3},
        },
        "prune": {
            "class_type": "ConceptPruneCode",
            "inputs": {"codes": ["words", 0], "method": "gradient", "keep": 4, "exclusive": True, "active_in": 0.5}
            | {"draws": 3, "seed": 0, "model": [world, 0], "clip": [world, 1], "concept_set": ["set", 0]},
        },
        "prompt": {"class_type": "CLIPTextEncode", "inputs": {"clip": [world, 1], "text": text}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
    }
    for name, amount in (("none", 0.0), ("much", 60.0)):
        made[name] = {
            "class_type": "ConceptSteerWord",
            "inputs": {"clip": [world, 1], "conditioning": ["prompt", 0], "dictionary": [learner, 0], "text": text}
            | {"word": "mug", "latents": "0, 1", "mode": "add", "amount": amount},
        }
    for name, source in (("stock", "prompt"), ("same", "none"), ("other", "much")):
        made[f"sample-{name}"] = {
            "class_type": "KSampler",
            "inputs": {"model": [world, 0], "positive": [source, 0], "negative": ["prompt", 0], "cfg": 1.0}
            | {"latent_image": ["empty", 0], "seed": 1, "steps": 3, "sampler_name": "euler", "scheduler": "normal"}
            | {"denoise": 1.0},
        }
        made[f"decode-{name}"] = {
            "class_type": "VAEDecode",
            "inputs": {"samples": [f"sample-{name}", 0], "vae": [world, 2]},
        }
        made[name] = {"class_type": "PreviewImage", "inputs": {"images": [f"decode-{name}", 0]}}
    outputs = run(client, made)
    assert "red: 4 kept latents" in outputs["prune"]["text"][0] and "score" in outputs["prune"]["text"][0]
    stock, same, other = (
        np.asarray(client.image(outputs[k]["images"][0])).astype(int) for k in ("stock", "same", "other")
    )
    assert (stock == same).all() and (stock != other).any()
    made["prune"]["inputs"].pop("model")
    result = client.queue(made)
    assert result["status"] == "error" and "connect model, clip and concept_set" in result["error"]["exception_message"]
