"""The API graphs and the nodes in them, run by a real headless ComfyUI over its own HTTP and websocket."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from concepts.carriers.files import parse
from concepts.carriers.foreign import read_any

API = Path(__file__).resolve().parents[2] / "workflows" / "api"


def graph(which: str, /, **learner) -> dict:
    """A graph of the pack; ``learner`` changes the inputs of its learning node."""
    made = json.loads(next(API.glob(f"{which}*.json")).read_text())
    for node in made.values():
        if node["class_type"] == "ConceptLearnTokens":
            node["inputs"] |= learner
    return made


def keys(made: dict, kind: str) -> list[str]:
    return [k for k, n in made.items() if n["class_type"] == kind]


def run(client, made: dict, **kwargs) -> dict:
    result = client.queue(made, **kwargs)
    assert result["status"] == "success", (result["error"] or {}).get("exception_message", result["error"])
    return result


def pixels(client, result, key) -> np.ndarray:
    return np.asarray(client.image(result["outputs"][key]["images"][0]))


def learning(called: str, /, **changes) -> dict:
    """The learning half of the first graph, alone."""
    made = graph("1_", **{"steps": 6, "preview_every": 2, "save_every": 0, "name": called, **changes})
    return {k: made[k] for k in ("1", "2", "3", "4", "8", "10")}


def test_learn_and_use(client, server):
    made = graph("1_", steps=8, preview_every=2)
    result = run(client, made)
    learner = keys(made, "ConceptLearnTokens")[0]
    shown = [
        e["data"]["value"] for e in result["events"] if e["type"] == "progress" and str(e["data"]["node"]) == learner
    ]
    assert shown == sorted(set(shown)) and {2, 4, 6, 8} <= set(shown)  # the host drops some steps without a preview
    assert len(result["previews"]) >= 4
    text = result["outputs"][learner]["text"][0]
    assert "8 steps" in text and "before" in text and "saved: output/concepts/autosave/novel" in text
    for key in keys(made, "SaveImage"):
        assert pixels(client, result, key).shape == (128, 128, 3)
    save = keys(made, "ConceptSaveCarrier")[0]
    said, where = result["outputs"][save]["text"]
    file = server.folder("output") / said.split()[-1]
    assert result["lines"][save] == [f"{said}\n{where}"], "the page shows no other text on a node"
    assert result["lines"][learner][-1] == "\n".join(text.splitlines()[:2]).replace("<novel>", "novel")
    assert Path(where).samefile(file)
    assert read_any(file).info["steps"] == 8
    assert json.loads(parse(file.read_bytes(), file)[1]["prompt"]).keys() == made.keys()


@pytest.mark.slow
def test_use_a_saved_concept(client):
    made = graph("2_")
    result = run(client, made)
    assert "<cross-mug>" in result["outputs"][keys(made, "ConceptInspectCarrier")[0]]["text"][0]
    drawn = [pixels(client, result, k) for k in keys(made, "SaveImage")]
    for key in keys(made, "ConceptEncodePrompt"):
        made[key]["inputs"]["strength"] = 0.0
    plain = run(client, made)
    for own, key in zip(drawn, keys(made, "SaveImage"), strict=True):
        assert abs(own.astype(int) - pixels(client, plain, key)).mean() > 3, "the concept is in the picture"


@pytest.mark.slow
def test_a_saved_file_is_a_stock_embedding(client):
    """The same picture from Concept Prompt and from stock nodes with embedding:name."""
    made = learning("stocked")
    made["10"]["inputs"] |= {"folder": "embeddings", "filename": "stocked"}
    rest = graph("1_")
    for key in ("11", "12", "13", "14", "15", "16"):
        made[key] = rest[key]
    made["13"]["inputs"]["text"] = "a big <stocked> on sand"
    first = run(client, made)
    assert first["outputs"]["10"]["text"][0] == "saved embeddings/stocked.safetensors"
    stock = {k: copy.deepcopy(made[k]) for k in ("1", "11", "12", "14", "15", "16")}
    stock["13"] = {
        "class_type": "CLIPTextEncode",
        "inputs": {"clip": ["1", 1], "text": "a big embedding:stocked on sand"},
    }
    assert (pixels(client, first, "16") == pixels(client, run(client, stock), "16")).all()


def test_plain_prompts_draw_the_same_picture(client):
    made = {k: v for k, v in graph("2_").items() if k in ("1", "2", "11", "12", "13", "14", "15", "16")}
    made["13"]["inputs"]["text"] = "a big (red:1.2) mug, sand background"
    ours = run(client, made)
    del made["2"]
    made["13"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": made["13"]["inputs"]["text"]}}
    assert (pixels(client, ours, "16") == pixels(client, run(client, made), "16")).all()


@pytest.fixture
def exact(request) -> bool:
    """Whether the same run gives the same bits: a GPU adds in an order of its own."""
    return not request.config.getoption("--gpu")


@pytest.mark.slow
def test_cancel_keeps_the_concept_and_the_next_run_is_fresh(client, server, exact):
    made, pressed = learning("cancelled", seed=5), []
    made["4"]["inputs"]["steps"] = 4000

    def cancel(event):
        data = event["data"]
        if event["type"] == "progress" and str(data["node"]) == "4" and data["value"] >= 3 and not pressed:
            pressed.append(data["value"])
            client.interrupt()

    assert client.queue(made, on_event=cancel)["status"] == "interrupted"
    (kept,) = (server.folder("output") / "concepts" / "autosave").glob("cancelled.safetensors")
    partial = read_any(kept)
    assert pressed[0] <= partial.info["steps"] < 4000
    again = learning("again", seed=5)
    again["4"]["inputs"] |= {"steps": partial.info["steps"], "name": "cancelled"}
    saved = run(client, again)["outputs"]["10"]["text"][0].split()[-1]
    fresh = read_any(server.folder("output") / saved)
    assert fresh.info["steps"] == partial.info["steps"]
    assert not exact or all((fresh.tensors[k] == v).all() for k, v in partial.tensors.items())


@pytest.mark.slow
def test_continue_from_a_loaded_concept(client, server):
    run(client, learning("onward"))
    made = learning("onward", continue_from=["20", 0], save_every=1)
    made["20"] = {"class_type": "ConceptLoadCarrier", "inputs": {"file": "concepts/onward.safetensors", "name": ""}}
    saved = run(client, made)["outputs"]["10"]["text"][0].split()[-1]
    assert saved == "concepts/onward_2.safetensors"
    assert read_any(server.folder("output") / saved).info["steps"] == 12


@pytest.mark.slow
def test_the_stock_loss_graph_takes_the_losses(client):
    made = learning("graphed")
    made["21"] = {"class_type": "LossGraphNode", "inputs": {"loss": ["4", 2], "filename_prefix": "loss"}}
    assert run(client, made)["outputs"]["21"]["images"]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["4_", "5_", "6_", "7_", "8_", "9_", "15_", "16_", "17_", "18_"])
def test_every_learner_learns_saves_and_draws(client, server, which):
    """The graphs of the other learners with fewer steps, from pictures to scenes."""
    learns_saves_and_draws(client, server, which, graph(which))


@pytest.mark.slow
def test_a_key_locked_concept_learns_saves_and_draws(client, server):
    """In the place of K/V tokens, on the same picture."""
    made, kind = graph("5_"), "ConceptLearnLocked"
    (learner,) = keys(made, "ConceptLearnKV")
    node, given = client.get(f"/object_info/{kind}")[kind], made[learner]["inputs"]
    own = {**node["input"]["required"], **node["input"].get("optional", {})}
    usual = {k: more[0]["default"] for k, (_, *more) in own.items() if more and "default" in more[0]}
    made[learner] = {"class_type": kind, "inputs": usual | {k: v for k, v in given.items() if k in own}}
    made = {k: n for k, n in made.items() if n["inputs"].get("images") != [learner, 5]}
    learns_saves_and_draws(client, server, "5_", made)


def learns_saves_and_draws(client, server, which, made):
    for node in made.values():
        if node["class_type"].startswith("ConceptLearn"):
            node["inputs"] |= {"steps": 3, "preview_every": 2, "save_every": 0}
            node["inputs"] |= {"class_pictures": 2} if node["inputs"].get("class_pictures") else {}
        if node["class_type"] in ("KSampler", "ConceptFuseLoras"):
            node["inputs"]["steps"] = 3
    result = run(client, made)
    learners = [k for k, n in made.items() if n["class_type"].startswith("ConceptLearn")]
    assert learners and all("3 steps" in result["outputs"][k]["text"][0] for k in learners)
    for key in keys(made, "SaveImage"):
        assert all(client.image(ref).size == (128, 128) for ref in result["outputs"][key]["images"])
    for key in keys(made, "ConceptSaveCarrier"):
        folder, name = result["outputs"][key]["text"][0].removeprefix("saved ").split("/")
        place = server.folder("models" if folder == "loras" else "output") / folder / name
        assert read_any(place).info.get("steps", 3) == 3  # a mix has none
    if which == "4_":
        assert len(result["outputs"][keys(made, "SaveImage")[-1]]["images"]) == 5, "a picture per residual"
    if which == "17_":
        assert len(result["outputs"][keys(made, "SaveImage")[-1]]["images"]) == 2, "a picture per word"


@pytest.mark.slow
def test_a_concept_is_refined_for_one_picture(client, exact):
    """The picture made inside is the KSampler's, and the same prompt and seed give another one afterwards."""
    made = graph("12_")
    result = run(client, made)
    before, after = (pixels(client, result, k) for k in keys(made, "SaveImage"))
    assert (before != after).any()
    report = result["outputs"]["4"]["text"][0]
    assert report.startswith("<cross-mug> for ") and "self attention loss" in report and "after" in report
    assert result["outputs"]["5"]["images"]
    made["4"]["inputs"].pop("generated")
    made["5"]["inputs"]["images"] = ["4", 2]
    again = run(client, made)
    assert (pixels(client, again, "5") == before).all()
    assert not exact or (pixels(client, again, keys(made, "SaveImage")[1]) == after).all()


@pytest.mark.slow
def test_references_are_read_once_for_many_prompts(client):
    """The host keeps what Extract Features gave, and the picture is refined as without it but for rounding."""
    made = graph("12_")
    (save,) = keys(made, "SaveImage")[1:]
    plain = run(client, made)
    given = {k: made["4"]["inputs"][k] for k in ("model", "clip", "vae", "image")}
    given |= {"text": "a photo of a mug", "preset": "DIFT", "words": "", "seed": 11}
    by_hand = {"timestep": -1, "block": "", "layer": "", "ensemble": 0, "add_noise": "auto"}
    made["40"] = {"class_type": "ConceptExtractFeatures", "inputs": given | by_hand}
    made["4"]["inputs"]["reference_features"] = ["40", 0]
    kept = run(client, made)
    reports = [r["outputs"]["4"]["text"][0].splitlines() for r in (plain, kept)]
    assert "40" in kept["outputs"] and reports[0][0] == reports[1][0], "other points were matched"
    assert abs(pixels(client, kept, save).astype(int) - pixels(client, plain, save)).mean() < 2
    made["4"]["inputs"]["text"] = "a photo of a <cross-mug>, on the right, grass background"
    other = run(client, made)
    cached = [e["data"]["nodes"] for e in other["events"] if e["type"] == "execution_cached"]
    assert "40" in cached[0] and "4" not in cached[0]
    made["40"]["inputs"]["text"] = "a photo of <cross-mug>"
    made["40"]["inputs"]["concepts.concept0"] = ["3", 0]
    result = client.queue(made)
    assert result["status"] == "error" and "under plain words" in result["error"]["exception_message"]


@pytest.mark.slow
def test_a_concept_that_cannot_be_refined_says_why(client):
    made = graph("12_")
    made["4"]["inputs"] |= {"minimum_score": 1.0}
    result = run(client, made)
    before, after = (pixels(client, result, k) for k in keys(made, "SaveImage"))
    assert "<cross-mug> is as it was. Only" in result["outputs"]["4"]["text"][0]
    assert (before == after).all()
    made["4"]["inputs"] |= {"strict": True}
    result = client.queue(made)
    assert result["status"] == "error" and "was not refined" in result["error"]["exception_message"]


@pytest.mark.slow
def test_train_a_dictionary(client, server):
    made = graph("13_")
    (learner,), (words,) = keys(made, "ConceptTrainDictionary"), keys(made, "ConceptEncodeWords")
    made[learner]["inputs"] |= {"steps": 30, "name": "taught"}
    result = run(client, made)
    assert "30 steps" in result["outputs"][learner]["text"][0]
    assert "red: 4 active latents in 1 places" in result["outputs"][words]["text"][0]
    assert len(list((server.folder("output") / "dictionaries").glob("taught*.safetensors"))) == 1


@pytest.mark.slow
def test_look_inside_a_word(client):
    """Latents get the names of corpus words, few are kept, and one that is turned up shows in the picture."""
    made = graph("14_")
    for key in keys(made, "KSampler"):
        made[key]["inputs"]["steps"] = 10
    result = run(client, made)
    words, kept = (result["outputs"][keys(made, k)[0]]["text"][0] for k in ("ConceptEncodeWords", "ConceptPruneCode"))
    assert re.search(r"moon: 4 active latents in 1 places\n  10: [0-9.]+ \(moon", words)
    assert re.search(r"moon: [1-4] kept latents in 1 places\n  10: [0-9.]+, score 0\.[0-9]+ \(moon", kept)
    plain, moon, green = (pixels(client, result, k).astype(int) for k in keys(made, "SaveImage"))
    assert (plain != moon).any() and (plain != green).any()
    before, after = ((p[..., 1] - (p[..., 0] + p[..., 2]) / 2).mean() for p in (plain, green))
    assert after > before, "the picture turned green"


@pytest.mark.parametrize(
    "file", ["concepts/../../secret", "concepts//etc/passwd", "elsewhere/x.safetensors", "concepts/gone.safetensors"]
)
def test_files_outside_the_list_are_refused(client, file):
    made = {k: v for k, v in graph("2_").items() if k in ("1", "2", "3", "4")}
    made["2"]["inputs"]["file"] = file
    result = client.queue(made)
    assert result["status"] == "invalid" and "2" in result["error"]["node_errors"]


def test_an_unknown_name_says_what_is_connected(client):
    made = graph("2_")
    made["13"]["inputs"]["text"] = "a <typo> on sand"
    result = client.queue(made)
    assert result["status"] == "error"
    assert "<typo>" in result["error"]["exception_message"] and "<cross-mug>" in result["error"]["exception_message"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init_text": ""}, "class word"),
        ({"use_clip_l": False}, "clip_l"),
        ({"timestep_low": 0.9, "timestep_high": 0.1}, "timestep range"),
        ({"name": "two words"}, "letters, digits"),
    ],
)
def test_wrong_inputs_of_the_learner_say_what_to_do(client, change, message):
    result = client.queue(learning("wrong", **change))
    assert result["status"] in ("error", "invalid")
    assert message in json.dumps(result["error"])


@pytest.mark.slow
def test_learn_on_my_own_checkpoint(host, client, server):
    """The third template with the stock checkpoint loader, at a size and length for a CPU."""
    from PIL import Image

    from .checkpoint import write

    made = graph("3_", steps=2, accumulate=1, preview_every=1)
    (loader,) = (n for n in made.values() if n["class_type"] == "CheckpointLoaderSimple")
    write(server.folder("models") / "checkpoints" / loader["inputs"]["ckpt_name"])
    Image.effect_noise((96, 64), 50).convert("RGB").save(server.folder("input") / "example.png")
    for node in made.values():
        small = {
            "ConceptMakeSet": {"resolution": 64},
            "EmptyLatentImage": {"width": 64, "height": 64},
            "KSampler": {"steps": 2},
        }
        node["inputs"] |= small.get(node["class_type"], {})
    result = run(client, made)
    assert result["outputs"][keys(made, "ConceptSaveCarrier")[0]]["text"][0] == "saved embeddings/novel.safetensors"
    assert read_any(server.folder("models") / "embeddings" / "novel.safetensors").tensors["clip_l"].shape[-1] == 768
    assert pixels(client, result, keys(made, "SaveImage")[0]).shape == (64, 64, 3)
    for node in made.values():
        if node["class_type"].startswith("ConceptLearn"):
            node["inputs"]["seed"] += 1
    run(client, made)  # on weights that sampling has used since


def test_the_same_parts_are_found_in_two_pictures(client):
    result = run(client, made := graph("10_"))
    pictures = [client.image(i) for k in keys(made, "PreviewImage") for i in result["outputs"][k]["images"]]
    assert [p.size for p in pictures] == [(268, 128)] * 4 + [(128, 128)] * 4
    (matched,) = (result["outputs"][k]["text"][0] for k in keys(made, "ConceptMatchFeatures"))
    assert int(matched.split()[0]) >= 5
    (found,) = (json.loads(result["outputs"][k]["text"][0]) for k in keys(made, "ConceptMatchPoint"))
    assert len(found) == 3 and all(0 <= row[2] <= 128 and 0 <= row[3] <= 128 for row in found)


@pytest.mark.slow
def test_a_mask_is_transferred_and_the_picture_found(client):
    result = run(client, made := graph("11_"))
    (finder,) = keys(made, "ConceptFindPicture")
    best = int(result["outputs"][finder]["text"][0].split(":")[0].removeprefix("picture "))
    assert best >= 2, "the first two show another mug"
    mask, others = (
        [np.asarray(client.image(i).convert("RGB")) for i in result["outputs"][k]["images"]] for k in ("8", "9")
    )
    assert (pixels(client, result, "16") == others[best - 2]).all()
    assert len(mask) == 4 and all(1 < m.mean() < 128 for m in mask)
