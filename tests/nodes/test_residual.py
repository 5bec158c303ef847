"""Learn Residual Tokens in a real server: the lists it gives walk through the stock nodes, one picture per residual."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("length, drawn", [(8, 3), (0, 0)])
def test_every_residual_is_drawn(client, length, drawn):
    """Without residuals what would draw them is left out, and the rest of the graph runs."""
    made = {
        "toy": {"class_type": "ConceptLoadToyWorld", "inputs": {}},
        "pictures": {
            "class_type": "ConceptLoadToyReferences",
            "inputs": {"subject": "cross-mug", "count": 3, "seed": 0},
        },
        "set": {
            "class_type": "ConceptMakeSet",
            "inputs": {"images": ["pictures", 0], "captions": ["pictures", 2], "vae": ["toy", 2]}
            | {"template": "object", "resolution": 0, "mirror": False},
        },
        "learn": {
            "class_type": "ConceptLearnResiduals",
            "inputs": {"model": ["toy", 0], "clip": ["toy", 1], "concept_set": ["set", 0]}
            | defaults(client)
            | {"preset": "custom", "class_word": "mug", "steps": 2, "residual_length": length}
            | {"preview_every": 0, "save_every": 0},
        },
        "prompt": {
            "class_type": "ConceptEncodePrompt",
            "inputs": {"clip": ["toy", 1], "text": ["learn", 6], "strength": 1.0, "concepts.concept0": ["learn", 5]},
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
        "curve": {"class_type": "PreviewImage", "inputs": {"images": ["learn", 1]}},
    }
    result = client.queue(made)
    assert result["status"] == "success", result["error"]
    assert len(result["outputs"].get("show", {}).get("images", [])) == drawn
    assert client.image(result["outputs"]["curve"]["images"][0]).size == (640, 3 * 240 if drawn else 360)


def defaults(client) -> dict:
    """The learner's widgets as they stand on a new node."""
    node = client.get("/object_info/ConceptLearnResiduals")["ConceptLearnResiduals"]
    entries = {**node["input"]["required"], **node["input"].get("optional", {})}
    return {k: more[0]["default"] for k, (_, *more) in entries.items() if more and "default" in more[0]}
