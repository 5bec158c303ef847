"""Extract and show features in a real server, on the toy world with stock nodes around it."""

import json

import numpy as np
import pytest

EXTRACT = {"timestep": -1, "block": "", "layer": "", "ensemble": 2, "add_noise": "auto", "seed": 0}


def graph(**changes) -> dict:
    return {
        "toy": {"class_type": "ConceptLoadToyWorld", "inputs": {}},
        "pictures": {
            "class_type": "ConceptLoadToyReferences",
            "inputs": {"subject": "cross-mug", "count": 3, "seed": 0},
        },
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["pictures", 0], "vae": ["toy", 2]}},
        "extract": {
            "class_type": "ConceptExtractFeatures",
            "inputs": {"model": ["toy", 0], "clip": ["toy", 1], "text": "a photo of a mug", "preset": "DIFT + PDM"}
            | {"words": "mug", "image": ["pictures", 0], "vae": ["toy", 2], **EXTRACT, **changes},
        },
        "again": {
            "class_type": "ConceptExtractFeatures",
            "inputs": {"model": ["toy", 0], "clip": ["toy", 1], "text": "a photo of a mug", "preset": "DIFT"}
            | {"words": "", "latent": ["encode", 0], **EXTRACT},
        },
        "show": {
            "class_type": "ConceptShowFeatures",
            "inputs": {"features": ["extract", 0], "kind": "dift", "second_features": ["again", 0]}
            | {"mask": ["pictures", 1], "second_mask": ["pictures", 1]},
        },
        "look": {"class_type": "PreviewImage", "inputs": {"images": ["show", 0]}},
    }


def test_pictures_and_latents_give_the_same_colours(client):
    result = client.queue(graph())
    assert result["status"] == "success", result["error"]
    report = result["outputs"]["extract"]["text"][0]
    for line in (
        "3 pictures of 128 x 128, 2 passes",
        "dift: 128 channels",
        "query: 64 channels",
        "attention mug: 1 ch",
    ):
        assert line in report
    images = [np.asarray(client.image(i)).astype(int) for i in result["outputs"]["look"]["images"]]
    assert len(images) == 6 and images[0].shape == (128, 128, 3) and images[0].std() > 10
    for first, second in zip(images[:3], images[3:], strict=True):
        assert abs(first - second).max() <= 2
    assert abs(images[0] - images[1]).max() > 50


def test_a_wrong_block_lists_those_there_are(client):
    result = client.queue(graph(block="output_blocks.5"))
    assert result["status"] == "error"
    assert "output_blocks.0, output_blocks.1, output_blocks.2, output_blocks.3" in result["error"]["exception_message"]


def test_the_object_is_found_in_other_pictures(client):
    made = graph()
    del made["show"], made["look"], made["again"]
    same = {"first": ["extract", 0], "second": ["extract", 0], "kind": "dift"}
    options = {"mutual": False, "minimum_score": -1.0, "best": 0, "finer": True, "shown": 20, "frames": 3}
    made["match"] = {
        "class_type": "ConceptMatchFeatures",
        "inputs": {**same, **options, "first_picture": 0, "second_picture": 1, "first_mask": ["pictures", 1]}
        | {"first_image": ["pictures", 0], "second_image": ["pictures", 0]},
    }
    made["move"] = {"class_type": "ConceptTransferMask", "inputs": {**same, "mask": ["pictures", 1]}}
    made["ways"] = {
        "class_type": "WanMoveVisualizeTracks",
        "inputs": {"images": ["pictures", 0], "tracks": ["match", 3], "line_resolution": 24}
        | {"circle_size": 3, "opacity": 1.0, "line_width": 2},
    }
    made["seen"] = {"class_type": "MaskToImage", "inputs": {"mask": ["move", 0]}}
    made["truth"] = {"class_type": "MaskToImage", "inputs": {"mask": ["pictures", 1]}}
    for name, source in (("lines", "match"), ("found", "seen"), ("wanted", "truth"), ("frames", "ways")):
        made[name] = {"class_type": "PreviewImage", "inputs": {"images": [source, 0]}}
    result = client.queue(made)
    assert result["status"] == "success", result["error"]
    assert "pairs, cosine" in result["outputs"]["match"]["text"][0]
    assert client.image(result["outputs"]["lines"]["images"][0]).size == (128 + 12 + 128, 128)
    assert len(result["outputs"]["frames"]["images"]) == 3, "the stock node draws the tracks"
    found, wanted = (
        [np.asarray(client.image(i).convert("L")) / 255 for i in result["outputs"][k]["images"]]
        for k in ("found", "wanted")
    )
    for one, two in zip(found, wanted, strict=True):
        assert one[two > 0.5].mean() > one[two <= 0.5].mean() + 0.4
        assert ((one > 0.5) & (two > 0.5)).sum() > 0.45 * ((one > 0.5) | (two > 0.5)).sum()


def test_a_point_is_found_in_every_picture(client):
    made = graph(preset="DIFT", words="")
    del made["show"], made["look"], made["again"]
    same = {"first": ["extract", 0], "second": ["extract", 0], "kind": "dift"}
    shown = {"first_image": ["pictures", 0], "second_images": ["pictures", 0]}
    made["by mask"] = {
        "class_type": "ConceptMatchPoint",
        "inputs": {**same, **shown, "x": 0.0, "y": 0.0, "mask": ["pictures", 1]},
    }
    made["heat"] = {"class_type": "MaskToImage", "inputs": {"mask": ["by mask", 1]}}
    for name, source in (("rings", "by mask"), ("seen", "heat")):
        made[name] = {"class_type": "PreviewImage", "inputs": {"images": [source, 0]}}
    result = client.queue(made)
    assert result["status"] == "success", result["error"]
    rows = json.loads(result["outputs"]["by mask"]["text"][0])
    assert len(rows) == 3 and rows[0][4] > 0.9 and abs(np.subtract(rows[0][:2], rows[0][2:4])).max() < 8
    assert [client.image(i).size for i in result["outputs"]["rings"]["images"]] == [(128 + 12 + 128, 128)] * 3
    own = np.asarray(client.image(result["outputs"]["seen"]["images"][0]).convert("L"))
    y, x = np.unravel_index(own.argmax(), own.shape)
    assert abs(x - rows[0][0]) < 8 and abs(y - rows[0][1]) < 8
    del made["by mask"]["inputs"]["mask"]
    made["by mask"]["inputs"] |= {"x": rows[0][0], "y": rows[0][1]}
    again = client.queue(made)
    assert json.loads(again["outputs"]["by mask"]["text"][0]) == [pytest.approx(row, abs=0.01) for row in rows]
    made["by mask"]["inputs"]["x"] = 128.5
    assert "outside of the first picture" in client.queue(made)["error"]["exception_message"]


def test_the_picture_that_shows_it_is_found(client):
    made = graph()
    del made["show"], made["look"], made["again"]
    made["hats"] = {
        "class_type": "ConceptLoadToyReferences",
        "inputs": {"subject": "red-blue-hat", "count": 2, "seed": 0},
    }
    made["more"] = {"class_type": "ConceptLoadToyReferences", "inputs": {"subject": "cross-mug", "count": 1, "seed": 1}}
    made["all"] = {
        "class_type": "BatchImagesNode",
        "inputs": {"images.image0": ["hats", 0], "images.image1": ["more", 0]},
    }
    made["others"] = {
        "class_type": "ConceptExtractFeatures",
        "inputs": {**made["extract"]["inputs"], "image": ["all", 0]},
    }
    made["find"] = {
        "class_type": "ConceptFindPicture",
        "inputs": {"reference": ["extract", 0], "candidates": ["others", 0], "mask": ["pictures", 1]},
    }
    made["one"] = {
        "class_type": "ImageFromBatch",
        "inputs": {"image": ["all", 0], "batch_index": ["find", 0], "length": 1},
    }
    for name, source in (("found", ["one", 0]), ("wanted", ["more", 0]), ("chart", ["find", 3])):
        made[name] = {"class_type": "PreviewImage", "inputs": {"images": source}}
    result = client.queue(made)
    assert result["status"] == "success", result["error"]
    text = result["outputs"]["find"]["text"][0]
    assert text.startswith("picture 2: 0.") and text.endswith("by dift, query, key")
    found, wanted = (np.asarray(client.image(result["outputs"][k]["images"][0])) for k in ("found", "wanted"))
    assert (found == wanted).all()
    assert client.image(result["outputs"]["chart"]["images"][0]).size[0] == 640
