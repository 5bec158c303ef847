"""Learn Scene Tokens in a real server: two things of one picture, drawn each and out of a loaded file."""

import json

import pytest

WIDGETS = {
    **{"name": "scene", "words": "mug\nbackground", "vectors": 1, "steps": 2, "learning_rate": 0.01, "batch": 1},
    **{"seed": 0, "attention_weight": 0.01, "attention_layers": "half", "accumulate": 1, "timestep_law": "uniform"},
    **{"timestep_low": 0.0, "timestep_high": 1.0, "use_clip_l": True, "use_clip_g": True, "use_t5xxl": True},
    **{"use_other": True, "preview_every": 0, "save_every": 0, "checkpointing": "off"},
}


def graph(text, concept, **changes) -> dict:
    """What is learned, and a prompt drawn with it."""
    return {
        "toy": {"class_type": "ConceptLoadToyWorld", "inputs": {}},
        "pictures": {
            "class_type": "ConceptLoadToyReferences",
            "inputs": {"subject": "cross-mug", "count": 1, "seed": 0},
        },
        "set": {
            "class_type": "ConceptMakeSet",
            "inputs": {"images": ["pictures", 0], "captions": "", "vae": ["toy", 2]}
            | {"template": "object", "resolution": 0, "mirror": True},
        },
        "ground": {"class_type": "InvertMask", "inputs": {"mask": ["pictures", 1]}},
        "masks": {
            "class_type": "BatchMasksNode",
            "inputs": {"masks.mask0": ["pictures", 1], "masks.mask1": ["ground", 0]},
        },
        "learn": {
            "class_type": "ConceptLearnScene",
            "inputs": {"model": ["toy", 0], "clip": ["toy", 1], "concept_set": ["set", 0], "masks": ["masks", 0]}
            | WIDGETS
            | changes,
        },
        "save": {
            "class_type": "ConceptSaveCarrier",
            "inputs": {"concept": ["learn", 0], "filename": "", "folder": "concepts"}
            | {"training_state": True, "workflow": False},
        },
        "prompt": {
            "class_type": "ConceptEncodePrompt",
            "inputs": {"clip": ["toy", 1], "text": text, "strength": 1.0, "concepts.concept0": concept},
        },
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {"model": ["toy", 0], "positive": ["prompt", 0], "negative": ["prompt", 0]}
            | {"latent_image": ["empty", 0], "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler"}
            | {"scheduler": "normal", "denoise": 1.0},
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["toy", 2]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}},
        "attention": {"class_type": "PreviewImage", "inputs": {"images": ["learn", 5]}},
    }


def run(client, made: dict) -> dict:
    result = client.queue(made)
    assert result["status"] == "success", (result["error"] or {}).get("exception_message", result["error"])
    return result["outputs"]


@pytest.mark.slow
def test_every_thing_is_drawn_and_a_loaded_file_has_them_all(client):
    outputs = run(client, graph(["learn", 7], ["learn", 6]))
    assert len(outputs["show"]["images"]) == 2 and len(outputs["attention"]["images"]) == 1
    assert outputs["learn"]["text"][0].splitlines()[-1] == "<scene1> from mug, <scene2> from background"
    kept = outputs["save"]["text"][0].removeprefix("saved ")
    made = graph("a photo of a <scene1> and <room2>", ["file", 0])
    made["file"] = {"class_type": "ConceptLoadCarrier", "inputs": {"file": kept, "name": ""}}
    result = client.queue(made)
    assert "<room2>" in result["error"]["exception_message"] and "<scene2>" in result["error"]["exception_message"]
    made["prompt"]["inputs"]["text"] = "a photo of a <scene1> and <scene2>"
    made["learn"]["inputs"] |= {"continue_from": ["file", 0], "steps": 1}
    outputs = run(client, made)
    assert len(outputs["show"]["images"]) == 1 and "3 steps" in outputs["learn"]["text"][0]


@pytest.mark.slow
def test_a_word_too_few_says_what_to_do(client):
    result = client.queue(graph("a photo of <scene1>", ["learn", 0], words="mug"))
    assert result["status"] == "error" and "write one line per mask in words" in json.dumps(result["error"])
