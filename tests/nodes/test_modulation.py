"""Learn Modulation and words in prompts in a real headless ComfyUI: what they say where they cannot work."""

import json
from pathlib import Path

API = Path(__file__).resolve().parents[2] / "workflows" / "api"
PLAIN = {
    "name": "picture1",
    "captions": "a [mug] on grass",
    "steps": 2,
    "learning_rate": 0.001,
    "batch": 1,
    "seed": 0,
    "shared_steps": 1,
    "blocks": "all",
    "isolation": 0.0,
    "accumulate": 1,
    "timestep_law": "two stages",
    "timestep_low": 0.0,
    "timestep_high": 1.0,
    "masked_loss": False,
    "hidden": 16,
    "guidance": 1.0,
    "isolation_prompts": "",
    "preview_every": 0,
    "save_every": 0,
    "checkpointing": "auto",
}


def parts(*keys: str) -> dict:
    made = json.loads(next(API.glob("1_*.json")).read_text())
    return {k: made[k] for k in keys}


def error(client, graph: dict) -> str:
    result = client.queue(graph)
    assert result["status"] == "error"
    return result["error"]["exception_message"]


def test_a_unet_is_refused_with_a_sentence(client):
    graph = parts("1", "2", "3")
    sources = {"model": ["1", 0], "clip": ["1", 1], "concept_set": ["3", 0]}
    graph["20"] = {"class_type": "ConceptLearnModulation", "inputs": {**sources, **PLAIN}}
    assert "does not modulate text tokens" in error(client, graph)


def test_a_word_of_a_concept_that_is_not_there_is_named(client):
    graph = parts("1", "13", "14", "15", "16", "11", "12")
    graph["13"]["inputs"] = {"clip": ["1", 1], "text": "a <picture1:mug> on grass", "strength": 1.0}
    assert "names <picture1:mug>, but the connected concepts are: none" in error(client, graph)
