"""What the user drags: schemas and tooltips. Each module ends with the list of its nodes."""

from comfy_api.latest import ComfyExtension, io

from ..host import folders

folders.register()  # loaders list its files when the modules below define their schemas

from . import (  # noqa: E402
    attention,
    concept_set,
    dictionary,
    features,
    files,
    finding,
    kv,
    learn,
    locked,
    lora,
    matching,
    mix,
    modulation,
    prompt,
    refine,
    residual,
    scene,
    toy,
    words,
)

MODULES = [
    *(toy, concept_set, learn, residual, kv, scene, locked, lora),
    *(modulation, refine, prompt, mix, attention),
    *(features, matching, finding, dictionary, words, files),
]


class ConceptCarriers(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]


async def comfy_entrypoint() -> ConceptCarriers:
    return ConceptCarriers()
