"""Opens every template in ComfyUI's own web page, fails on missing nodes and error badges, keeps a picture of each.

``nox -s screenshots -- --run`` runs each and looks again; ``-- --thumbnails`` makes ``workflows/*.jpg`` of what comes
of it; ``-- --lay-out`` rebuilds the templates from the graphs in ``workflows/api`` and the notes in notes.json.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageOps

from demo.server import PACK, Server

SIZE = (640, 360)
MOST = 8


def thumbnail(server: Server, nodes: list[list[dict]], graph: Path) -> Image.Image:
    """The first pictures of every node, side by side; the graph where there are none."""
    some = [picture for images in nodes[:MOST] for picture in images[: MOST // min(len(nodes), MOST)]]
    files = [server.folder(p["type"]) / p["subfolder"] / p["filename"] for p in some] or [graph]
    rows = round(math.sqrt(len(files) / 2)) or 1
    across = math.ceil(len(files) / rows)
    cell = (SIZE[0] // across - 4, SIZE[1] // rows - 4)
    sheet = Image.new("RGB", SIZE, (24, 24, 24))
    for i, file in enumerate(files):
        picture = ImageOps.contain(Image.open(file).convert("RGB"), cell, Image.LANCZOS)
        x, y = (i % across + 0.5) * SIZE[0] / across, (i // across + 0.5) * SIZE[1] / rows
        sheet.paste(picture, (round(x - picture.width / 2), round(y - picture.height / 2)))
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", type=Path, required=True, help="ComfyUI folder")
    parser.add_argument("--out", type=Path, default=PACK / "out" / "screenshots")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--thumbnails", action="store_true", help="run each and renew workflows/*.jpg")
    what.add_argument("--lay-out", action="store_true", help="rebuild workflows/*.json from workflows/api")
    what.add_argument("--run", action="store_true", help="run each template too")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    server = Server(options.host, options.out / "comfyui")
    for place, name in (("models/checkpoints", "v1-5-pruned-emaonly.safetensors"), ("input", "example.png")):
        (server.folder(place)).mkdir(parents=True, exist_ok=True)  # what a user has who opens the third template
        (server.folder(place) / name).touch()
    Image.new("RGB", (512, 512), (200, 60, 50)).save(server.folder("input") / "example.png")
    with server:
        done = subprocess.run(
            [
                "node",
                str(Path(__file__).with_name("templates.mjs")),
                server.url,
                str(PACK / "workflows"),
                str(options.out),
                "lay-out" if options.lay_out else "run" if options.run or options.thumbnails else "open",
            ],
            env={
                "NODE_PATH": str(PACK / ".cache/ui/node_modules"),
                "PATH": "/usr/bin:/bin:/usr/local/bin",
                "HOME": "/tmp",
            },
            capture_output=True,
            text=True,
            timeout=1800,
        )
    sys.stderr.write(done.stderr)
    if done.returncode:
        return done.returncode
    bad = 0
    for name, found in json.loads(done.stdout).items():
        print(f"{name}: {found['nodes']} nodes, missing {found['missing']}, errors {found['errors']}")
        bad += bool(found["missing"] or found["errors"])
        if options.thumbnails:
            picture = thumbnail(server, found["pictures"], options.out / f"{name}.png")
            picture.save(PACK / "workflows" / f"{name}.jpg", quality=82, optimize=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
