"""Opens every template in ComfyUI's own web page, fails on missing nodes and error badges, keeps a picture of each.

``nox -s screenshots -- --thumbnails`` also renews ``workflows/*.jpg``; ``-- --run`` runs each and looks again; ``--
--lay-out`` rebuilds the templates from the graphs in ``workflows/api`` and the notes in notes.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from demo.server import PACK, Server

SIZE = (640, 360)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", type=Path, required=True, help="ComfyUI folder")
    parser.add_argument("--out", type=Path, default=PACK / "out" / "screenshots")
    parser.add_argument("--thumbnails", action="store_true", help="renew workflows/*.jpg")
    parser.add_argument("--lay-out", action="store_true", help="rebuild workflows/*.json from workflows/api")
    parser.add_argument("--run", action="store_true", help="run each template too")
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
                "lay-out" if options.lay_out else "run" if options.run else "open",
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
            picture = Image.open(options.out / f"{name}.png").convert("RGB")
            picture.thumbnail(SIZE, Image.LANCZOS)
            picture.save(PACK / "workflows" / f"{name}.jpg", quality=82, optimize=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
