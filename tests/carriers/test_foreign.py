"""Foreign embeddings: the same rows as the stock host reads from the same file, and never any code."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from concepts.carriers.errors import CarrierFileError
from concepts.carriers.foreign import read_any, unpickled

from .test_files import mutations


def rows(n=2, width=768, dtype=torch.float32):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(width)).to(dtype)


FILES = {
    "a1111.pt": {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": rows()},
        "name": "my mug!",
        "step": 500,
        "sd_checkpoint_name": "v1-5",
    },
    "rinongal.pt": {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(rows())}),
    },
    "a1111_sdxl.pt": {"clip_l": rows(), "clip_g": rows(width=1280)},
    "diffusers.bin": {"<cat-toy>": rows(1)[0]},
    "diffusers.safetensors": {"<cat-toy>": rows(3)},
    "kohya.safetensors": {"emb_params": rows(4, dtype=torch.float16)},
    "kohya_sdxl.safetensors": {"clip_g": rows(width=1280, dtype=torch.bfloat16), "clip_l": rows(dtype=torch.bfloat16)},
    "flux.safetensors": {"t5xxl": rows(width=4096), "clip_l": rows()},
    "sd2.safetensors": {"emb_params": rows(width=1024)},
    "wan.safetensors": {"umt5xxl": rows(width=4096)},
    "bundle.safetensors": {
        "lora_unet_x.lora_up.weight": torch.zeros(4, 4),
        "bundle_emb.cat.v1.clip_l": rows(),
        "bundle_emb.cat.v1.clip_g": rows(width=1280),
    },
    "bundle_plain.safetensors": {"bundle_emb.cat.v1.string_to_param.*": rows()},
}
WIDTHS = {"clip_l": 768, "clip_h": 1024, "clip_g": 1280, "t5xxl": 4096, "umt5xxl": 4096}


def store(content, path):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("file", FILES)
def test_equals_what_the_stock_host_reads(file, host, tmp_path):
    from comfy.sd1_clip import load_embed

    path = store(FILES[file], tmp_path / file)
    concept = read_any(path)
    assert concept.info["source"]
    for key, value in concept.tensors.items():
        stock = load_embed(path.name, [str(tmp_path)], WIDTHS[key], key)
        assert torch.equal(value[0, 0, 0], stock.reshape(-1, WIDTHS[key]).float())


@pytest.mark.parametrize(
    "file, name, keys",
    [
        ("a1111.pt", "my_mug", ["clip_l"]),
        ("rinongal.pt", "rinongal", ["clip_l"]),
        ("diffusers.bin", "cat-toy", ["clip_l"]),
        ("kohya.safetensors", "kohya", ["clip_l"]),
        ("kohya_sdxl.safetensors", "kohya_sdxl", ["clip_g", "clip_l"]),
        ("sd2.safetensors", "sd2", ["clip_h"]),
        ("wan.safetensors", "wan", ["umt5xxl"]),
        ("bundle.safetensors", "cat_v1", ["clip_g", "clip_l"]),
        ("bundle_plain.safetensors", "cat_v1", ["clip_l"]),
    ],
)
def test_names_and_encoders(file, name, keys, tmp_path):
    concept = read_any(store(FILES[file], tmp_path / file))
    assert concept.name == name and sorted(concept.tensors) == keys


@pytest.mark.parametrize(
    "names",
    [
        {"clip_l": "clip_l", "t5": "t5xxl"},
        {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"},
        {"text_encoders_1": "clip_g"},
    ],
)
def test_other_names_of_encoders(names, tmp_path):
    content = {k: rows(width=WIDTHS[v]) for k, v in names.items()}
    concept = read_any(store(content, tmp_path / "x.safetensors"))
    assert concept.tensors.keys() == set(names.values())
    assert all(torch.equal(concept.tensors[v][0, 0, 0], content[k]) for k, v in names.items())


def test_a_lora_with_a_bundled_embedding(tmp_path):
    path = store(
        {"lora_unet_x.lora_up.weight": torch.zeros(4, 4), "bundle_emb.mug.string_to_param.*": rows()},
        tmp_path / "lora.safetensors",
    )
    concept = read_any(path)
    assert concept.name == "mug" and torch.equal(concept.tensors["clip_l"][0, 0, 0], rows())
    path = store({"bundle_emb.a.clip_l": rows(), "bundle_emb.b.clip_l": rows()}, tmp_path / "two.safetensors")
    with pytest.raises(CarrierFileError, match="several embeddings"):
        read_any(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"x": torch.zeros(1, 77)}, "width 77"),
        ({"a.lora_up": torch.zeros(4, 4), "a.lora_down": torch.zeros(4, 4)}, "not a Textual Inversion file"),
        ({f"lora_unet_x.lora_{part}.weight": torch.zeros(4, 4) for part in ("down", "up")}, "stock LoRA loader"),
        ({"model.weight": torch.zeros(2, 2, 2)}, "not a Textual Inversion file"),
        ({"clip_l": rows(), "t6": rows(width=4096)}, "named t6 beside those for clip_l"),
        ({"clip_l": rows(), "clip_g": rows(width=1280)[None]}, "clip_g beside those for clip_l"),
        ({"clip_l": rows(), "text_encoders_0": rows()}, "beside those for clip_l"),
        ({"clip_l": torch.full((1, 768), float("inf"))}, "numbers under clip_l that are not finite; take another"),
        ({"emb_params": torch.full((1, 768), 1e300, dtype=torch.float64)}, "under clip_l .* not finite; take another"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    with pytest.raises(CarrierFileError, match=message):
        read_any(store(content, tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "content",
    [
        {0: rows()},
        {b"clip_l": rows()},
        {("a", 1): rows()},
        {"string_to_param": {265: rows()}},
        {"emb_params": rows(0)},
        {"emb_params": rows().long()},
        {265: rows(), "bundle_emb.mug.string_to_param.*": torch.zeros(2, 2, 2)},
        {"string_to_param": {"*": rows().to("meta")}},
        {"string_to_param": {"*": rows().to_sparse()}},
        {"string_to_param": {"*": torch.nested.nested_tensor([rows()[0], rows()[1]])}},
    ],
    ids=["int", "bytes", "tuple", "inner", "empty", "whole", "bundle", "meta", "sparse", "nested"],
)
def test_odd_keys_and_tensors_are_refused(content, tmp_path):
    # torch may refuse to load a nested tensor before anyone looks at it
    with pytest.raises(CarrierFileError, match="x.pt is not (a Textual Inversion file|an embedding that can)"):
        read_any(store(content, tmp_path / "x.pt"))


def test_a_small_file_of_huge_tensors_is_refused(tmp_path):
    """All of them count: together they would take 3 GB."""
    content = {k: torch.zeros(1, w).expand(60_000, w) for k, w in WIDTHS.items()}
    path = store(content, tmp_path / "x.pt")
    assert path.stat().st_size < 50_000
    with pytest.raises(CarrierFileError, match="more numbers than an embedding does"):
        read_any(path)


def test_facts_are_taken_where_they_are_of_their_kind(tmp_path):
    facts = {"source": "A1111 embedding", "file": "mug.pt", "step": 500, "sd_checkpoint_name": "v1-5"}
    made = read_any(store({**FILES["a1111.pt"], "name": "m" * 70}, tmp_path / "mug.pt"))
    assert made.name == "m" * 64 and made.info == facts
    odd = {"name": ["cat"], "step": None, "sd_checkpoint_name": torch.ones(2)}
    made = read_any(store({**FILES["a1111.pt"], **odd}, tmp_path / "mug.pt"))
    assert made.name == "mug" and made.info.keys() == {"source", "file"}


def test_single_numbers_beside_the_vectors_are_no_vectors(tmp_path):
    made = read_any(store({"clip_l": rows(), "step": torch.tensor(500)}, tmp_path / "x.safetensors"))
    assert made.tensors.keys() == {"clip_l"}


def test_a_pickle_is_held_to_a_size_and_to_names(tmp_path):
    path = store({"clip_l": rows()}, tmp_path / "x.pt")
    with pytest.raises(CarrierFileError, match="unpacks to more than a dictionary holds"):
        unpickled(path.read_bytes(), path, "a dictionary", 1000)
    with pytest.raises(CarrierFileError, match="x.pt holds a list, not an embedding"):
        read_any(store([rows()], path))


class Hostile:
    """Its pickle would make a folder when loaded."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(zipped, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    torch.save({"string_to_param": {"*": rows()}, "x": Hostile(marker)}, path, _use_new_zipfile_serialization=zipped)
    refused = rf"loaded safely \(it asks for {os.mkdir.__module__}.mkdir\)"
    with pytest.raises(CarrierFileError, match=refused):
        read_any(path)
    path.write_bytes(pickle.dumps(Hostile(marker), protocol=2))
    with pytest.raises(CarrierFileError, match=refused):
        read_any(path)
    assert not marker.exists()


def test_no_other_class_in_a_pickle_is_made(tmp_path):
    allowed = set(torch.serialization.get_safe_globals())
    for other in (torch.nn.ParameterList([torch.nn.Parameter(rows())]), torch.nn.Linear(2, 2)):
        path = store({"string_to_param": other}, tmp_path / "x.pt")
        with pytest.raises(CarrierFileError, match=rf"it asks for torch.nn.modules.\w+.{type(other).__name__}\)"):
            read_any(path)
    read_any(store(FILES["rinongal.pt"], tmp_path / "x.pt"))
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("content", [b"PK\x03\x04 and no more", b"\x80\x02junk", b"\x80\x02\x1b[1m"])
def test_a_broken_pickle_is_said_to_be_damaged(content, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CarrierFileError, match=r"loaded safely \(it is damaged, or of another kind\)"):
        read_any(path)


@pytest.mark.slow
def test_a_zip_bomb_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(1100):
                entry.write(bytes(1 << 20))
    with pytest.raises(CarrierFileError, match="more than an embedding"):
        read_any(path)


def test_a_header_whose_length_begins_like_a_pickle(tmp_path):
    path, found = tmp_path / "mug.safetensors", []
    for size in range(256):
        save_file({"emb_params": rows()}, path, {"note": "x" * size})
        if path.read_bytes()[:1] == b"\x80":
            found.append(read_any(path))
    assert found and all(torch.equal(c.tensors["clip_l"][0, 0, 0], rows()) for c in found)


@pytest.mark.parametrize("file", ["a1111.pt", "kohya.safetensors"])
def test_damage_is_a_typed_error_or_a_valid_concept(file, tmp_path):
    """Foreign files carry no checksum, so damaged numbers cannot be told; nothing worse may happen."""
    path = store(FILES[file], tmp_path / file)
    whole = path.read_bytes()
    draw = random.Random(1)
    damaged = (
        list(mutations(whole, 300, 2))
        if file.endswith("s")
        else [
            whole[:i] + bytes([draw.randrange(256)]) + whole[i + 1 :]
            for i in (draw.randrange(len(whole)) for _ in range(300))
        ]
    )
    for content in damaged:
        path.write_bytes(content)
        try:
            read_any(path)
        except CarrierFileError as error:
            assert path.name in str(error)
