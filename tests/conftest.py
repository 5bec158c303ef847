"""The pack as package ``concepts``, ComfyUI in this process (``host``) and as a real server (``server``)."""

import functools
import os
import sys
import types
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent

# The pack's own __init__ needs a running host; the alias also keeps our nodes/ apart from ComfyUI's nodes.py.
package = types.ModuleType("concepts")
package.__path__ = [str(PACK)]
sys.modules["concepts"] = package

sys.path.append(str(PACK))
import demo  # noqa: E402, F401 # else pytest knows tests/demo by this name where it comes first


def pytest_addoption(parser):
    parser.addoption("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="folder of the ComfyUI to test against")
    parser.addoption("--gpu", action="store_true", help="let the headless ComfyUI use the GPU")
    parser.addoption("--snapshot-update", action="store_true", help="write tests/nodes/schema.json anew")


@pytest.fixture(scope="session")
def comfyui(request) -> Path:
    """Folder of the ComfyUI under test."""
    path = request.config.getoption("--comfyui")
    if not path or not (Path(path) / "main.py").exists():
        raise pytest.UsageError(f"No ComfyUI at {path!r}: run `nox -s tests`, or pass --comfyui=FOLDER")
    return Path(path).resolve()


@pytest.fixture(scope="session")
def host(comfyui) -> Path:
    """ComfyUI imported into this process on the CPU; after it ``import comfy.sd`` and ``import nodes`` work."""
    sys.path.insert(0, str(comfyui))
    kept, sys.argv = sys.argv, [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401

    sys.argv = kept
    # Importing `nodes` puts comfy/ first on the path, where `utils` is another module than the host's package.
    import utils.install_util  # noqa: F401, I001

    sys.modules.pop("nodes", None)  # pytest knows tests/nodes by this name; everything there is collected by now
    import nodes  # noqa: F401, I001
    import comfy.sd  # noqa: F401
    import torch
    from transformers import PreTrainedTokenizerBase

    # Reading a vocabulary takes longer than making a tiny model, and nobody changes what was read.
    read = functools.cache(PreTrainedTokenizerBase.from_pretrained.__func__)
    PreTrainedTokenizerBase.from_pretrained = classmethod(read)
    torch.set_num_threads(1)  # on tensors this small, threads only wait for each other
    return comfyui


@pytest.fixture(scope="session")
def server(request, comfyui, tmp_path_factory):
    """A headless ComfyUI with this pack, shared by the whole run."""
    from concepts.demo.server import Server

    with Server(comfyui, tmp_path_factory.mktemp("comfy"), cpu=not request.config.getoption("--gpu")) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    from concepts.demo.server import Client

    return Client(server.url)


def pytest_collection_modifyitems(items):
    for item in items:
        if {"host", "comfyui", "server", "client"} & set(item.fixturenames):
            item.add_marker("host")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files stay whole, and those that need the server stay with one worker, so that one is started."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "server" if "nodes/" in nodeid or "workflows/" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None
