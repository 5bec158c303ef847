"""Where concepts live on disk (folder_paths.py)."""

from pathlib import Path

import folder_paths

from ..carriers.concept import Concept
from ..carriers.delta import bundled

KIND = "concepts"
EXAMPLES = Path(__file__).resolve().parent.parent / "demo" / "concepts"


def register() -> None:
    """Makes ``models/concepts``, ``output/concepts`` and the pack's examples known to the host."""
    places = [
        str(Path(folder_paths.models_dir) / KIND),
        str(Path(folder_paths.get_output_directory()) / KIND),
        str(EXAMPLES),
    ]
    known = folder_paths.folder_names_and_paths.get(KIND, ([], set()))[0]
    extensions = {".safetensors", ".pt", ".bin"}
    folder_paths.folder_names_and_paths[KIND] = ([*dict.fromkeys([*known, *places])], extensions)


def saved() -> list[str]:
    """Names of every concept and embedding file, as a loader lists them."""
    return [f"{kind}/{name}" for kind in (KIND, "embeddings") for name in folder_paths.get_filename_list(kind)]


def find(name: str) -> Path:
    """File of a listed name. Raises: FileNotFoundError naming the folders searched."""
    kind, _, inner = name.partition("/")
    path = folder_paths.get_full_path(kind, inner) if kind in (KIND, "embeddings") else None
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(KIND) + folder_paths.get_folder_paths("embeddings"))
        raise FileNotFoundError(f"There is no concept file {name!r}; looked in {folders}.")
    return Path(path)


def output(*inner: str) -> Path:
    """``output/concepts/...``, made when missing."""
    place = Path(folder_paths.get_output_directory(), KIND, *inner)
    place.mkdir(parents=True, exist_ok=True)
    return place


def home(folder: str, concept: Concept) -> Path:
    """Where a concept is saved: ``concepts`` is output/concepts, others are the host's first folder of that name.

    Raises: ValueError when the stock loader of that folder could not read it.
    """
    if folder == KIND:
        return output()
    if concept.kind == "modulation":
        raise ValueError(f"<{concept.name}> modulates words, which only Concept Prompt can do; choose concepts.")
    if folder == "embeddings" and concept.kind == "delta" and not bundled(concept.tensors, concept.name):
        raise ValueError(f"<{concept.name}> bundles no token rows, so it is no embedding; choose concepts or loras.")
    if folder == "loras" and concept.kind != "delta":
        raise ValueError(f"<{concept.name}> is made of {concept.kind}; choose concepts or embeddings.")
    place = Path(folder_paths.get_folder_paths(folder)[0])
    place.mkdir(parents=True, exist_ok=True)
    return place


def metadata_allowed() -> bool:
    """False when the host was started with --disable-metadata."""
    from comfy.cli_args import args

    return not args.disable_metadata
