"""Concept files: whole or not at all, read completely or refused with a sentence.

The golden files were written once by ``write_concept(made(), path, {"note": "golden"})``.
"""

import errno
import json
import multiprocessing
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from concepts.carriers.concept import Concept
from concepts.carriers.errors import CarrierFileError
from concepts.carriers.files import claim, digest, parse, read_bytes, write_concept, write_new
from concepts.carriers.foreign import read_any
from concepts.kernels import controller, neti

HERE = Path(__file__).parent
PREAMBLE = f"""
import sys, types
package = types.ModuleType("concepts"); package.__path__ = [{str(Path(__file__).resolve().parents[2])!r}]
sys.modules["concepts"] = package
import torch
from concepts.carriers.concept import Concept
from concepts.carriers.files import write_concept
from pathlib import Path
"""


def golden() -> Concept:
    rows = torch.arange(16, dtype=torch.float32).reshape(1, 1, 1, 2, 8) / 8
    return Concept(
        "mug",
        "tokens",
        {"clip_l": rows, "clip_g": -rows[..., :1, :]},
        {"steps": 3, "seed": 2**64 - 1, "encoders": ["clip_l"]},
        {
            "first.clip_l": rows[0, 0, 0] + 1,
            "step": torch.tensor(3),
            "losses": torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64),
        },
    )


def layered() -> Concept:
    rows = torch.randn(5, 3, 2, 1, 8, generator=torch.Generator().manual_seed(1))
    return Concept("deep", "tokens", {"clip_l": rows}, {"layers": ["input.1", "middle.0", "output.1"]})


def keys_and_values() -> Concept:
    return Concept("kv", "tokens", {"clip_l": torch.arange(16.0).reshape(1, 1, 2, 1, 8)})


def golden_delta() -> Concept:
    """Weights, plain bundled rows, and bundled rows per stage."""
    values = torch.arange(24, dtype=torch.float32) / 8
    return Concept(
        "mug",
        "delta",
        {
            "lora_unet_down_blocks_0_attn2_to_k.lora_down.weight": values[:6].reshape(2, 3),
            "lora_unet_down_blocks_0_attn2_to_k.lora_up.weight": -values[:8].reshape(4, 2),
            "lora_unet_down_blocks_0_attn2_to_k.alpha": torch.tensor(2.0),
            "bundle_emb.mug.clip_l": values[:16].reshape(1, 1, 1, 2, 8),
            "bundle_emb.mug.clip_g": values.reshape(3, 1, 1, 1, 8),
        },
        {"steps": 3, "architecture": "SD15", "token_text": ""},
        {"first.lora_unet_down_blocks_0_attn2_to_k.alpha": values[:2], "step": torch.tensor(3)},
    )


def mapper() -> Concept:
    shapes = neti.start(3, 4, torch.Generator().manual_seed(0), anchors=2, hidden=5, count=6)
    tensors = {k: torch.arange(v.numel(), dtype=torch.float32).reshape(v.shape) / 8 for k, v in shapes.items()}
    return Concept(
        "mapped",
        "mapper",
        {f"clip_l.{k}": v for k, v in tensors.items()},
        {"layers": ["input.1", "middle.0", "output.0"], "anchors": 2, "norms": {"clip_l": 0.375}},
        {"first.clip_l.input.bias": torch.ones(6), "step": torch.tensor(3)},
    )


def modulation() -> Concept:
    """Two words, one for all blocks and one for each, and the network that makes them."""
    network = controller.start(3, 4, 2, 5, torch.Generator().manual_seed(0))
    tensors = {"word.0": torch.arange(8.0).reshape(2, 1, 4) / 8, "word.1": torch.arange(12.0).reshape(1, 3, 4) / 8}
    tensors |= {
        f"controller.{k}": torch.arange(v.numel(), dtype=torch.float32).reshape(v.shape) / 8 for k, v in network.items()
    }
    info = {
        "words": ["hat", "northern lights"],
        "blocks": ["double.0", "single.0"],
        "encoders": ["t5xxl"],
        "input": "dense",
    }
    return Concept("picture1", "modulation", tensors, info, {"first.controller.block.gate": torch.ones(2, 5)})


def edit() -> Concept:
    values = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8
    parts = {"row.clip_l": values[:1, :4], "direction": values[1], "dual": values[2], "keys": values[:1]}
    info = {"layers": ["input.1", "middle.0", "output.0"], "beta": 0.75, "tau": 0.1, "init_text": "mug"}
    return Concept("locked", "edit", {**parts, "values": values[1:]}, info, {"first.values": values[1:]})


FILES = [
    (golden, "golden_tokens_v1.safetensors"),
    (golden_delta, "golden_delta_v1.safetensors"),
    (mapper, "golden_mapper_v1.safetensors"),
    (modulation, "golden_modulation_v1.safetensors"),
    (edit, "golden_edit_v1.safetensors"),
]


def same(a: Concept, b: Concept) -> bool:
    def equal(x, y):
        return x.keys() == y.keys() and all(v.dtype == y[k].dtype and torch.equal(v, y[k]) for k, v in x.items())

    return (
        (a.name, a.kind, a.info) == (b.name, b.kind, b.info) and equal(a.tensors, b.tensors) and equal(a.state, b.state)
    )


@pytest.mark.parametrize("made", [golden, layered, keys_and_values, golden_delta, mapper, modulation, edit])
def test_round_trip(made, tmp_path):
    write_concept(made(), tmp_path / "a.safetensors", {"prompt": json.dumps({"1": {}})})
    assert same(read_any(tmp_path / "a.safetensors"), made())
    tensors, metadata = parse((tmp_path / "a.safetensors").read_bytes(), tmp_path)
    assert list(tensors) == sorted(tensors), "safetensors gives them in an order of chance"
    assert metadata["prompt"] == '{"1": {}}' and metadata["modelspec.trigger_phrase"] == f"<{made().name}>"
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("made, file", FILES)
def test_golden_files_read_for_ever_and_are_still_written(made, file, tmp_path):
    assert same(read_any(HERE / file), made())
    write_concept(made(), tmp_path / "new.safetensors", {"note": "golden"})
    old, new = (parse(p.read_bytes(), p) for p in (HERE / file, tmp_path / "new.safetensors"))
    assert old[1] == new[1]  # the digest in it covers every tensor


def test_a_delta_is_a_stock_lora_and_a_stock_embedding(host, tmp_path):
    from comfy.lora import load_lora
    from comfy.sd1_clip import load_embed

    write_concept(golden_delta(), tmp_path / "mug.safetensors")
    tensors, _ = parse((tmp_path / "mug.safetensors").read_bytes(), tmp_path)
    layer, made = "lora_unet_down_blocks_0_attn2_to_k", golden_delta().tensors
    ((target, adapter),) = load_lora(tensors, {layer: "x.weight"}, log_missing=False).items()
    up, down, alpha, *_ = adapter.weights
    assert target == "x.weight" and alpha == 2.0
    assert torch.equal(up, made[layer + ".lora_up.weight"]) and torch.equal(down, made[layer + ".lora_down.weight"])
    assert torch.equal(load_embed("mug", [str(tmp_path)], 8, "clip_l"), made["bundle_emb.mug.clip_l"][0, 0, 0])


def test_the_stock_host_reads_plain_tokens(host, tmp_path):
    from comfy.sd1_clip import load_embed

    write_concept(golden(), tmp_path / "mug.safetensors")
    for key, size in (("clip_l", 8), ("clip_g", 8)):
        stock = load_embed("mug", [str(tmp_path)], size, key)
        assert torch.equal(stock, golden().tensors[key][0, 0, 0])


def mutations(data: bytes, count: int, seed: int):
    """Seeded damage: flipped bytes, cut ends, lost, doubled and swapped blocks, wrong header lengths, changed keys."""
    draw = random.Random(seed)
    size, header = len(data), 8 + int.from_bytes(data[:8], "little")
    for number in range(count):
        at, span = draw.randrange(size), draw.randrange(1, 64)
        kind = number % 8
        if kind in (0, 1):
            place = draw.randrange(header) if kind else at
            yield data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        elif kind == 2:
            yield data[:at]
        elif kind == 3:
            yield data[:at] + data[at + span :]
        elif kind == 4:
            yield data[:at] + data[at : at + span] + data[at:]
        elif kind == 5:
            other = draw.randrange(header, size - span)
            first = draw.randrange(header, size - span)
            low, high = sorted((first, other))
            yield data[:low] + data[high : high + 8] + data[low + 8 : high] + data[low : low + 8] + data[high + 8 :]
        elif kind == 6:
            yield draw.choice([draw.randrange(2**63), draw.randrange(header * 2)]).to_bytes(8, "little") + data[8:]
        else:
            word = draw.choice(
                [
                    b"concepts.format",
                    b"concepts.digest",
                    b"__metadata__",
                    b"clip_l",
                    b"lora_up",
                    b"bundle_emb",
                    b"concepts.kind",
                    b"tokens",
                    b"F32",
                    b"data_offsets",
                ]
            )
            yield data.replace(word, word[:-1] + bytes([draw.randrange(33, 126)]), 1)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("made", [golden, layered, golden_delta, mapper, modulation, edit])
def test_damaged_files_are_refused_with_a_sentence(made, count, tmp_path):
    path = tmp_path / "a.safetensors"
    write_concept(made(), path, {"prompt": "{}"})
    whole, untouched = path.read_bytes(), 0
    for damaged in mutations(whole, count, seed=len(whole)):
        path.write_bytes(damaged)
        try:
            assert same(read_any(path), made()), "a damaged file was read as another concept"
            untouched += damaged != whole
        except CarrierFileError as error:
            assert path.name in str(error) and len(str(error)) > 40 and str(error).rstrip(")'\"").endswith((".", "}"))
    assert untouched < 10


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 8, b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_safetensors_file_is_refused(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CarrierFileError, match=path.name):
        read_any(path)
    with pytest.raises(CarrierFileError, match="cannot be read"):
        read_any(tmp_path / "missing.safetensors")
    with pytest.raises(CarrierFileError, match="cannot be read"):
        read_any(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no file size limits")
def test_a_full_disk_leaves_the_older_file(tmp_path):
    """The kernel refuses the write itself, as a full disk does."""
    import resource

    path = tmp_path / "a.safetensors"
    write_concept(golden(), path)
    code = (
        PREAMBLE
        + f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
write_concept(Concept("other", "tokens", {{"clip_l": torch.ones(1, 1, 1, 4, 64)}}), Path({str(path)!r}))
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "CarrierFileError" in done.stderr and "unharmed" in done.stderr
    assert same(read_any(path), golden()) and os.listdir(tmp_path) == [path.name]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200


@pytest.mark.skipif(os.name == "nt", reason="no folders that sync")
def test_a_folder_that_cannot_be_synced_keeps_what_was_written(tmp_path, monkeypatch):
    sync = os.fsync

    def files_only(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")  # as VirtualBox's shared folders say
        sync(number)

    monkeypatch.setattr(os, "fsync", files_only)
    assert same(read_any(write_new(golden(), tmp_path, "mug")), golden())


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted" / "drive")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "gone", tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(CarrierFileError, match=f"{place.name}.*choose another folder"):
            write_new(golden(), place, "mug")


@pytest.mark.parametrize("info", ["[" * 100000, f'{{"steps": {"9" * 5000}}}'])
def test_hostile_facts_are_refused_with_a_sentence(info, tmp_path):
    tensors = {"clip_l": torch.ones(2, 4)}
    facts = {"concepts.format": "1", "concepts.kind": "tokens", "concepts.name": "mug", "concepts.info": info}
    save_file(tensors, tmp_path / "a.safetensors", facts | {"concepts.digest": digest(tensors, facts)})
    with pytest.raises(CarrierFileError, match="not a whole concept"):
        read_any(tmp_path / "a.safetensors")


def test_a_newer_format_is_refused(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"clip_l": torch.ones(2, 4)}
    facts = {"concepts.format": "2", "concepts.kind": "tokens", "concepts.name": "mug", "concepts.info": "{}"}
    save_file(tensors, path, facts | {"concepts.digest": digest(tensors, facts)})
    with pytest.raises(CarrierFileError, match="has format '2', this version reads 1; update the pack"):
        read_any(path)


def test_what_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    from concepts.carriers import files

    monkeypatch.setattr(files, "LARGEST", 100)
    for write in (
        lambda: write_concept(golden(), tmp_path / "a.safetensors"),
        lambda: write_new(golden(), tmp_path, "a"),
    ):
        with pytest.raises(CarrierFileError, match="more than this pack reads .100.; save it without training_state"):
            write()
    assert not list(tmp_path.iterdir())


def test_what_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(101))
    with pytest.raises(CarrierFileError, match="a.safetensors is 101 bytes large"):
        read_bytes(path, 100)
    assert read_bytes(path, 101) == bytes(101)


def test_a_name_can_be_taken_without_a_file(tmp_path):
    (tmp_path / "mug_2.safetensors").write_text("")
    assert claim(tmp_path, "mug", lambda path: path.stem in ("mug", "mug_3")).stem == "mug_4"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.safetensors"
    code = (
        PREAMBLE
        + f"""
print("ready", flush=True)
for number in range(10**6):
    rows = torch.full((1, 1, 1, 8, 4096), float(number))
    write_concept(Concept(f"n{{number}}", "tokens", {{"clip_l": rows}}), Path({str(path)!r}))
"""
    )
    draw = random.Random(0)
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(0.05 + 0.2 * draw.random())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if path.exists():
            kept = read_any(path)
            assert kept.tensors["clip_l"].unique().tolist() == [float(kept.name[1:])]


def _write(folder: str) -> str:
    return str(write_new(golden(), Path(folder), "mug"))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_new_files_never_replace(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        written = pool.map(_write, [str(tmp_path)] * 8)
    assert len(set(written)) == 8 == len(os.listdir(tmp_path))
    assert all(same(read_any(Path(p)), golden()) for p in written)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mug", "mug"),
        ("mug.safetensors", "mug"),
        ("../../mug", "_.._mug"),
        ("a/b\\c:d", "a_b_c_d"),
        ("CON", "_CON"),
        ("nul.x", "_nul.x"),
        ("", "_"),
        ("...", "_"),
        ("m\u00fcg", "m\u00fcg"),
        ("mu\u0308g", "m\u00fcg"),
        ("\u0447\u0430\u0448\u043a\u0430/\u676f", "\u0447\u0430\u0448\u043a\u0430_\u676f"),
        ("\u676f" * 90, "\u676f" * 33),
        ("\ud800mug", "_mug"),
        ("x" * 300, "x" * 100),
        (" a b. ", "a b"),
        ("\0\n", "__"),
    ],
)
def test_file_names_stay_in_their_folder(name, expected, tmp_path):
    path = write_new(golden(), tmp_path / "sub", name)
    assert path == tmp_path / "sub" / f"{expected}.safetensors" and path.is_file()
