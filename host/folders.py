"""Where concepts and dictionaries live on disk (folder_paths.py)."""

from pathlib import Path

import folder_paths

KIND, DICTIONARIES = "concepts", "dictionaries"
KINDS = (KIND, "embeddings", "loras")
"""The host's folders that hold concepts."""
EXAMPLES = Path(__file__).resolve().parent.parent / "demo"


def register() -> None:
    """Makes the folders of both in models and output, and the pack's examples, known to the host."""
    for kind, pickles in ((KIND, {".pt", ".bin"}), (DICTIONARIES, {".pt", ".pth"})):
        places = [Path(folder_paths.models_dir, kind), Path(folder_paths.get_output_directory(), kind), EXAMPLES / kind]
        known = folder_paths.folder_names_and_paths.get(kind, ([], set()))[0]
        extensions = {".safetensors", *pickles}
        folder_paths.folder_names_and_paths[kind] = ([*dict.fromkeys([*known, *map(str, places)])], extensions)


def saved() -> list[str]:
    """Names of every file that may hold a concept, as a loader lists them."""
    return [f"{kind}/{name}" for kind in KINDS for name in folder_paths.get_filename_list(kind)]


def find(name: str) -> Path:
    """File of a listed name. Raises: FileNotFoundError naming the folders searched."""
    kind, _, inner = name.partition("/")
    path = folder_paths.get_full_path(kind, inner) if kind in KINDS else None
    if path is None:
        folders = ", ".join(place for known in KINDS for place in folder_paths.get_folder_paths(known))
        raise FileNotFoundError(f"There is no concept file {name!r}; looked in {folders}.")
    return Path(path)


def output(*inner: str) -> Path:
    """``output/concepts/...``, which need not exist."""
    return Path(folder_paths.get_output_directory(), KIND, *inner)


def shadowed(path: Path) -> bool:
    """Whether the host finds another file under the name that it would list this one by."""
    for kind in {*KINDS, DICTIONARIES} & set(folder_paths.folder_names_and_paths):  # ours are unknown before a start
        for place in folder_paths.get_folder_paths(kind):
            inner = path.relative_to(place) if path.is_relative_to(place) else None
            found = folder_paths.get_full_path(kind, str(inner)) if inner else None
            if found and Path(found) != path:
                return True
    return False


def saved_dictionaries() -> list[str]:
    """Names of every dictionary file."""
    return folder_paths.get_filename_list(DICTIONARIES)


def find_dictionary(name: str) -> Path:
    """File of a listed name. Raises: FileNotFoundError naming the folders searched."""
    path = folder_paths.get_full_path(DICTIONARIES, name)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(DICTIONARIES))
        raise FileNotFoundError(f"There is no dictionary file {name!r}; looked in {folders}.")
    return Path(path)


def dictionaries() -> Path:
    """``output/dictionaries``, which need not exist."""
    return Path(folder_paths.get_output_directory(), DICTIONARIES)


def home(folder: str, concept) -> Path:
    """Where a concept is saved: ``concepts`` is output/concepts, others are the host's first folder of that name.

    Raises: ValueError when the stock loader of that folder could not read it.
    """
    from .text import as_tokens  # not at every start

    if folder == KIND:
        return output()
    if concept.kind == "modulation":
        raise ValueError(f"<{concept.name}> modulates words, which only Concept Prompt can do; choose concepts.")
    rows = as_tokens(concept) if concept.kind in ("tokens", "delta") else None
    plain = rows is not None and all(value.shape[:3] == (1, 1, 1) for value in rows.tensors.values())
    if folder == "loras" and concept.kind != "delta":
        places = "concepts or embeddings" if plain else "concepts"
        raise ValueError(f"<{concept.name}> is made of {concept.kind}, which is no LoRA; choose {places}.")
    if folder == "embeddings" and rows is None:
        places = "concepts or loras" if concept.kind == "delta" else "concepts"
        raise ValueError(f"<{concept.name}> holds no token rows, so it is no embedding; choose {places}.")
    if folder == "embeddings" and not plain:
        raise ValueError(
            f"<{concept.name}> has rows per stage, layer or for K and V, which only Concept Prompt can use; choose "
            "concepts."
        )
    return Path(folder_paths.get_folder_paths(folder)[0])


def metadata_allowed() -> bool:
    """False when the host was started with --disable-metadata."""
    from comfy.cli_args import args

    return not args.disable_metadata
