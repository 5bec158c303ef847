"""Every template and its API form are the same graph, with nodes and values that both hosts know."""

import json
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(p.stem for p in FOLDER.glob("*.json"))
NOTES = ("MarkdownNote", "Note")
AFTER_SEED = ("fixed", "randomize", "increment", "decrement")


def as_api(workflow: dict) -> dict:
    """API form of a template: links by id, widgets by the order of their inputs."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        values, inputs = list(node.get("widgets_values", [])), {}
        for entry in node.get("inputs", []):
            value = values.pop(0) if "widget" in entry else None
            if "seed" in entry["name"] and values and values[0] in AFTER_SEED:
                values.pop(0)
            if entry["link"] is not None:
                inputs[entry["name"]] = links[entry["link"]]
            elif "widget" in entry:
                inputs[entry["name"]] = value
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def test_every_graph_has_a_template_and_a_thumbnail():
    assert len(NAMES) >= 3
    assert (
        NAMES == sorted(p.stem for p in (FOLDER / "api").glob("*.json")) == sorted(p.stem for p in FOLDER.glob("*.jpg"))
    )
    for name in NAMES:
        file = FOLDER / f"{name}.jpg"
        assert Image.open(file).size[0] >= 480 and file.stat().st_size < 120_000


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_graph(name):
    template = as_api(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    template.pop("upload", None)
    for key, node in graph.items():
        assert template[key]["class_type"] == node["class_type"]
        mine = {k: v for k, v in template[key]["inputs"].items() if k != "upload"}
        assert mine == node["inputs"], f"{name}: node {key}"
    assert template.keys() == graph.keys()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps(name):
    nodes = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
    boxes = [(*n["pos"], n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1] + 30, n["type"]) for n in nodes]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], f"{a[4]} lies over {b[4]}"


@pytest.mark.parametrize("name", NAMES)
def test_the_host_knows_every_node_and_value(name, client):
    known = client.get("/object_info")
    for node in json.loads((FOLDER / "api" / f"{name}.json").read_text()).values():
        schema = known[node["class_type"]]["input"]
        required = schema.get("required", {})
        for key, value in node["inputs"].items():
            kind, *options = {**required, **schema.get("optional", {})}.get(key.split(".")[0])
            choices = kind if isinstance(kind, list) else (options[0].get("options") if options else None)
            if choices and not isinstance(value, list) and key not in ("ckpt_name", "image", "file"):
                assert value in choices, f"{node['class_type']}.{key}"
        missing = [k for k, (kind, *o) in required.items() if k not in node["inputs"] and kind != "COMFY_AUTOGROW_V3"]
        assert not missing, f"{node['class_type']} lacks {missing}"
