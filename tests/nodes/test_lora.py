"""The delta nodes in a real headless ComfyUI: learned, saved, and drawn with by stock nodes alone."""

import json
from pathlib import Path

import numpy as np
import pytest

API = Path(__file__).resolve().parents[2] / "workflows" / "api"
PLAIN = {
    "token_text": "",
    "steps": 4,
    "learning_rate": 0.002,
    "batch": 2,
    "seed": 0,
    "rank": 4,
    "layers": "attention",
    "class_text": "a mug",
    "class_pictures": 1,
    "prior_weight": 1.0,
    "accumulate": 1,
    "timestep_law": "uniform",
    "timestep_low": 0.0,
    "timestep_high": 1.0,
    "masked_loss": False,
    "single_blocks": False,
    "weight_decay": 0.01,
    "clip_gradient": 1.0,
    "preview_every": 2,
    "save_every": 0,
    "checkpointing": "auto",
}


def graph() -> dict:
    """Tokens of one picture, then a delta against them, saved as a stock LoRA and drawn with."""
    made = json.loads(next(API.glob("1_*.json")).read_text())
    kept = {k: made[k] for k in ("1", "2", "3", "4", "11", "12", "13", "14", "15", "16")}
    kept["2"]["inputs"]["count"] = 1
    kept["4"]["inputs"] |= {"steps": 2, "preview_every": 0, "save_every": 0, "name": "served"}
    sources = {"model": ["1", 0], "clip": ["1", 1], "concept_set": ["3", 0], "name": "served"}
    learned = {"tokens": ["4", 0], "residuals": ["4", 0]}
    kept["20"] = {"class_type": "ConceptLearnLora", "inputs": {**sources, **PLAIN, **learned}}
    kept["21"] = {
        "class_type": "ConceptSaveCarrier",
        "inputs": {"concept": ["20", 0], "filename": "", "folder": "loras", "training_state": True, "workflow": False},
    }
    kept["22"] = {
        "class_type": "ConceptApplyCarrier",
        "inputs": {"model": ["1", 0], "concept": ["20", 0], "strength": 1.0},
    }
    kept["13"]["inputs"] |= {"text": "a <served> on sand", "concepts.concept0": ["20", 0]}
    (sampler,) = (n for n in kept.values() if n["class_type"] == "KSampler")
    sampler["inputs"]["model"] = ["22", 0]
    return kept


def drawn(client, made: dict) -> tuple[dict, np.ndarray]:
    result = client.queue(made)
    assert result["status"] == "success", (result["error"] or {}).get("exception_message", result["error"])
    (key,) = (k for k, n in made.items() if n["class_type"] == "SaveImage")
    return result["outputs"], np.asarray(client.image(result["outputs"][key]["images"][0])).astype(int)


@pytest.mark.slow
def test_learned_saved_and_loaded_by_the_stock_loader(client, server):
    made = graph()
    outputs, ours = drawn(client, made)
    assert "layers from lora_unet_" in outputs["20"]["text"][0] and "4 steps" in outputs["20"]["text"][0]
    assert outputs["21"]["text"][0] == "saved loras/served.safetensors"
    made["22"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["1", 0], "lora_name": "served.safetensors", "strength_model": 1.0},
    }
    del made["21"]
    begun = len(server.log)
    _, stock = drawn(client, made)
    assert (stock == ours).all()
    warned = [line for line in server.log[begun:].splitlines() if "not loaded" in line.lower()]
    assert all("bundle_emb" in line for line in warned), "the host reports its own convention and nothing else"
    made["23"] = {"class_type": "ConceptLoadCarrier", "inputs": {"file": "loras/served.safetensors", "name": ""}}
    apply = {"model": ["1", 0], "concept": ["23", 0], "strength": 1.0}
    made["22"] = {"class_type": "ConceptApplyCarrier", "inputs": apply}
    assert (drawn(client, made)[1] == ours).all()
    made["22"]["inputs"] = {**apply, "strength": 0.0}
    assert (drawn(client, made)[1] != ours).any()


@pytest.mark.slow
def test_a_concept_of_tokens_is_sent_to_its_own_node(client):
    made = graph()
    made["22"]["inputs"]["concept"] = ["4", 0]
    result = client.queue(made)
    assert result["status"] == "error" and "Concept Prompt" in result["error"]["exception_message"]
