"""What saved workflows and readers of the web page rely on: ids, order, defaults, tooltips and help pages.

``python -m pytest --comfyui=FOLDER tests/nodes/test_schema.py --snapshot-update`` writes schema.json anew, on purpose.
"""

import importlib
import json
import math
import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SNAPSHOT, PAGES = HERE / "schema.json", HERE.parents[1] / "web" / "docs"
FROZEN = (
    *("default", "min", "max", "step", "multiline", "advanced", "dynamicPrompts", "round"),
    "control_after_generate",  # a widget of its own behind the value
)
FILES = {("ConceptLoadCarrier", "file"), ("ConceptLoadDictionary", "file")}
"""Choices that depend on the user's folders."""


@pytest.fixture(scope="session")
def nodes(client) -> dict:
    """The pack's nodes as the web page sees them."""
    return {
        k: v for k, v in client.get("/object_info").items() if v["python_module"] == "custom_nodes.concept-carriers"
    }


def inputs(node: dict):
    """(section, name, type or choices, options) of every input, in order."""
    for section, entries in node["input"].items():
        for name, (kind, *more) in entries.items():
            yield section, name, kind, more[0] if more else {}


def frozen(nodes: dict) -> dict:
    """The part of the schemas that must not change."""
    result = {}
    for key, node in sorted(nodes.items()):
        entries = []
        for section, name, kind, options in inputs(node):
            choices = kind if isinstance(kind, list) else options.get("options")
            kept = {k: options[k] for k in FROZEN if k in options}
            if choices is not None:
                kind, kept["choices"] = "COMBO", None if (key, name) in FILES else choices
                if (key, name) in FILES:
                    kept.pop("default", None)
            if "template" in options:
                template = options["template"]
                kept["template"] = {k: template[k] for k in ("prefix", "min", "max") if k in template}
            if section != "hidden":
                entries.append({"name": name, "type": kind, "section": section, **kept})
        result[key] = {
            "display_name": node["display_name"],
            "category": node["category"],
            "output_node": node["output_node"],
            "is_input_list": bool(node.get("is_input_list")),
            "inputs": entries,
            "outputs": [list(pair) for pair in zip(node["output_name"], node["output"], strict=True)],
        }
    return json.loads(json.dumps(result))


def test_schemas_are_those_that_workflows_were_saved_with(nodes, request):
    now = frozen(nodes)
    if request.config.getoption("--snapshot-update"):
        SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n")
    assert now == json.loads(SNAPSHOT.read_text()), (
        f"a schema changed; saved workflows break. On purpose: {__doc__.splitlines()[2]}"
    )


def test_every_input_and_output_has_a_tooltip(nodes):
    for key, node in nodes.items():
        assert len(node["description"]) > 20, key
        for section, name, _, options in inputs(node):
            if section != "hidden":
                assert len(options.get("tooltip") or "") >= 10, f"{key}.{name} has no tooltip"
        assert len(node["output"]) == len(node["output_tooltips"]), key
        for name, tip in zip(node["output_name"], node["output_tooltips"], strict=True):
            assert len(tip or "") >= 10, f"{key} output {name} has no tooltip"


def decimals(step: float) -> int:
    """How many ComfyUI's page keeps of a typed number, whatever ``round`` says (frontend, useFloatWidget)."""
    return max(0, -math.floor(math.log10(step)))


def test_the_page_keeps_what_is_typed(nodes):
    places = {"x", "y"}  # pixels
    for key, node in nodes.items():
        for _, name, kind, options in inputs(node):
            if kind != "FLOAT" or (key, name) == ("ConceptRefineForPrompt", "cfg"):  # KSampler's
                continue
            kept = decimals(options["step"])
            assert kept >= (6 if name == "learning_rate" else 0 if name in places else 2), f"{key}.{name}"
            for limit in ("default", "min", "max"):
                assert round(options[limit], kept) == options[limit], f"{key}.{name}: {limit}"
            assert "round" not in options, f"{key}.{name}"


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(nodes, client):
    assert {p.stem for p in PAGES.glob("*.md")} == set(nodes)
    for key, node in nodes.items():
        page = (PAGES / f"{key}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {node['display_name']}\n")
        for section, name, _, _ in inputs(node):
            assert section == "hidden" or f"`{name}`" in page, f"{key}.md does not explain {name}"
        for name in node["output_name"]:
            assert f"`{name}`" in page, f"{key}.md does not explain {name}"
        served = client.request(f"/extensions/concept-carriers/docs/{key}.md").decode()
        assert served == page


def test_names_are_plain_and_unlike_each_other(nodes):
    shown = [node["display_name"] for node in nodes.values()]
    assert len(set(shown)) == len(shown)
    assert all(re.fullmatch(r"concepts/[a-z]+", node["category"]) for node in nodes.values())


def test_nothing_of_ours_is_in_the_log(server, nodes):
    lines = [
        line
        for line in server.log.split("To see the GUI")[0].splitlines()
        if re.search(r"concept[-_ ]?carrier", line, re.I)
    ]
    assert not [line for line in lines if re.search("warn|error|deprecat|traceback", line, re.I)], lines


KNOWN = [
    ("ConceptExtractFeatures", "preset", "host.feature_places", "PRESETS"),
    ("ConceptShowFeatures", "kind", "host.feature_pictures", "KINDS"),
    ("ConceptLearnKV", "mapper", "host.learn_kv", "MAPPERS"),
    ("ConceptLearnKV", "attention_layers", "host.attention", "LAYERS"),
    ("ConceptLearnScene", "attention_layers", "host.attention", "LAYERS"),
    ("ConceptLearnKV", "attention_loss", "kernels.attention", "LOSSES"),
    ("ConceptLearnLora", "layers", "host.lora", "CHOICES"),
    ("ConceptLearnResiduals", "preset", "host.learn_residual", "PRESETS"),
    ("ConceptLearnModulation", "blocks", "host.modulation", "CHOICES"),
    ("ConceptMixCarriers", "mode", "carriers.mix", "MODES"),
    ("ConceptLoadToyReferences", "subject", "demo.world", "NOVEL"),
    ("ConceptTrainDictionary", "kind", "host.learn_dictionary", "KINDS"),
    ("ConceptRefineForPrompt", "loss_text", "host.refine", "TEXTS"),
    ("ConceptSteerWord", "mode", "host.steer", "MODES"),
]
APART = {("ConceptLoadToyReferences", "subject"): ["two things"]}
"""Choices after those of the constant, which stand for code of their own."""


@pytest.mark.parametrize("node, name, module, constant", KNOWN, ids=lambda value: str(value))
def test_choices_that_stand_in_a_schema_are_what_the_code_behind_knows(host, node, name, module, constant):
    """Schemas name them literally, so that ComfyUI's start imports no learner."""
    known = importlib.import_module(f"concepts.{module}")
    entry = next(e for e in json.loads(SNAPSHOT.read_text())[node]["inputs"] if e["name"] == name)
    assert entry["choices"] == [*getattr(known, constant), *APART.get((node, name), [])]
