"""SDXL at its full size under the host's DynamicVRAM on a real GPU: learning leaves no trace in what is drawn, with all
of the memory, with fp8 weights, and with less memory than the weights need. Needs ``--gpu``."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from concepts.carriers.foreign import read_any

from .test_run import graph, pixels, run

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
NAME, SIDE, LEFT = "sdxl-random.safetensors", 512, 5 << 30
"""LEFT: bytes of the GPU for a server when others hold the rest; the weights take 6.5 GiB."""
WRITE = """
import sys
from bench import toy
toy.host()
from bench import full_size
full_size.write(sys.argv[1])
"""


@pytest.fixture(scope="module")
def checkpoint(request, comfyui, tmp_path_factory) -> Path:
    """What the stock loader reads, random weights in bf16."""
    if not request.config.getoption("--gpu"):
        pytest.skip("needs --gpu and an NVIDIA card")
    path = tmp_path_factory.mktemp("sdxl") / NAME
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", WRITE, str(path)], cwd=root, env=os.environ | {"COMFYUI_PATH": str(comfyui)}, check=True
    )
    return path


@pytest.fixture(params=["all of the memory", "fp8", "little memory"])
def kind(request):
    return request.param


@pytest.fixture
def served(kind, comfyui, checkpoint, tmp_path):
    """Server and client."""
    from concepts.demo.server import Client, Server

    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    (tmp_path / "models" / "checkpoints" / NAME).symlink_to(checkpoint)
    given = ("--cache-classic", *(("--fp8_e4m3fn-unet",) if kind == "fp8" else ()))
    with Server(comfyui, tmp_path, args=given, cpu=False) as server:
        if "DynamicVRAM support detected and enabled" not in server.log:
            pytest.skip("a host without DynamicVRAM")
        held = None
        if kind == "little memory":
            free, _ = torch.cuda.mem_get_info()
            held = torch.empty(free - LEFT, dtype=torch.uint8, device="cuda")
        yield server, Client(server.url)
        del held
        torch.cuda.empty_cache()


def drawing() -> dict:
    """A picture by stock nodes."""
    made = {k: v for k, v in graph("1_").items() if k in ("11", "12", "14", "15", "16")}
    made["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": NAME}}
    made["13"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red mug on sand"}}
    for node in made.values():
        node["inputs"] |= {
            "EmptyLatentImage": {"width": SIDE, "height": SIDE, "batch_size": 1},
            "KSampler": {"steps": 4},
        }.get(node["class_type"], {})
    return made


def learning(kind: str) -> dict:
    """Some steps of Learn Concept Tokens or Learn Concept LoRA."""
    made = {k: v for k, v in graph("1_" if kind == "tokens" else "6_").items() if k in ("2", "3", "4", "10")}
    made["1"] = drawing()["1"]
    made["3"]["inputs"]["resolution"] = SIDE
    made["4"]["inputs"] |= {"name": kind, "steps": 4, "batch": 1, "preview_every": 2, "save_every": 0}
    if kind == "lora":
        made["4"]["inputs"] |= {"class_pictures": 0, "prior_weight": 0.0}
    made["10"] = {
        "class_type": "ConceptSaveCarrier",
        "inputs": {
            "concept": ["4", 0],
            "filename": kind,
            "folder": "concepts",
            "training_state": False,
            "workflow": False,
        },
    }
    return made


def test_learning_between_two_drawings(served):
    server, client = served

    def picture():
        result = run(client, drawing())
        kept = [e["data"]["nodes"] for e in result["events"] if e["type"] == "execution_cached"]
        assert not any("14" in nodes for nodes in kept), "drawn anew"
        return pixels(client, result, "16")

    first = picture()
    for which in ("tokens", "lora"):
        run(client, learning(which))
        concept = read_any(server.folder("output") / "concepts" / f"{which}.safetensors")
        assert all(bool(t.isfinite().all()) for t in concept.tensors.values())
        assert concept.info["steps"] == 4
        assert (picture() == first).all(), f"the picture after {which}"
    assert len(np.unique(first)) > 16
