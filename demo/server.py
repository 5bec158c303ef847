"""A headless ComfyUI with this pack in it, and a client that runs prompts on it.

``python demo/server.py --host <ComfyUI folder>`` starts one to click in.
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from websocket import create_connection

PACK = Path(__file__).resolve().parent.parent
FOLDERS = ("custom_nodes", "input", "output", "models", "user", "temp")
PREVIEW, TEXT = 1, 3
"""Event number of a binary preview frame: event (4 bytes), picture format (4 bytes), the encoded picture."""


def lead(link: Path, target: Path) -> None:
    """Makes ``link`` lead to the folder ``target``, also where it led elsewhere.

    Raises: OSError when a folder of its own is there.
    """
    if link.exists() and link.samefile(target):
        return
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        # Without Developer Mode Windows refuses symbolic links, not junctions.
        from _winapi import CreateJunction

        CreateJunction(str(target), str(link))


class Server:
    """ComfyUI's ``main.py`` as a process of its own on a free port, with this pack as its only custom node.

    Args:
        host: folder of a ComfyUI.
        base: folder that takes its models, inputs, outputs and log; made when missing.
        args: further flags of ``main.py``.
        cpu: keep off the GPU.
    """

    def __init__(self, host: Path, base: Path, args: tuple[str, ...] = (), cpu: bool = True):
        self.host, self.base = Path(host).resolve(), Path(base).resolve()
        self.args, self.cpu = args, cpu
        self.process = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def folder(self, name: str) -> Path:
        """One of the folders under ``base``: ``server.folder("output")``."""
        return self.base / name

    def start(self, seconds: float = 240.0) -> "Server":
        """Returns once ``/object_info`` answers.

        Raises:
            RuntimeError: the host ended or was silent for ``seconds``; carries the end of its log.
        """
        for name in FOLDERS:
            self.folder(name).mkdir(parents=True, exist_ok=True)
        lead(self.folder("custom_nodes") / "concept-carriers", PACK)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable,
            "main.py",
            *(["--cpu"] if self.cpu else []),
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
            "--disable-api-nodes",
            "--database-url",
            "sqlite:///:memory:",
            *self.args,
        ]
        with open(self.base / "server.log", "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.host, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + seconds
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"ComfyUI in {self.host} did not start; the end of its log:\n{self.log[-3000:]}")
            time.sleep(0.25)
        return self

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/object_info", timeout=60):
                return True
        except OSError:
            return False

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *error) -> None:
        self.stop()


class Client:
    """Speaks to a running ComfyUI at ``url`` as its web page does."""

    def __init__(self, url: str):
        self.url = url

    def request(self, path: str, data: dict | None = None) -> bytes:
        """GET, or POST of ``data`` as JSON."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str):
        return json.loads(self.request(path))

    def queue(self, prompt: dict, seconds: float = 900.0, on_event: Callable[[dict], None] | None = None) -> dict:
        """Runs an API-format prompt to its end.

        Returns a dict: ``status`` ("success", "error", "interrupted", "invalid"), ``outputs`` (node id -> ui output),
        ``events`` (every websocket message, in order), ``previews`` (encoded pictures, in order), ``lines`` (node id
        -> texts on the node, in order), ``error`` (the host's message or None), ``prompt_id``, ``seconds``.
        ``on_event`` sees each message as it arrives.

        Raises:
            TimeoutError: the host sent nothing for ``seconds``.
        """
        result = {"status": "invalid", "outputs": {}, "events": [], "error": None, "prompt_id": None}
        result |= {"previews": [], "lines": {}}
        start, client = time.monotonic(), uuid.uuid4().hex
        channel = create_connection(f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client}", timeout=seconds)
        try:
            accepted = self.request("/prompt", {"prompt": prompt, "client_id": client})
            result["prompt_id"] = json.loads(accepted)["prompt_id"]
            self._listen(channel, result, on_event)
            result["outputs"] = self.get(f"/history/{result['prompt_id']}")[result["prompt_id"]]["outputs"]
        except urllib.error.HTTPError as refused:
            result["error"] = json.loads(refused.read())
        finally:
            channel.close()
        result["seconds"] = time.monotonic() - start
        return result

    def _listen(self, channel, result: dict, on_event: Callable[[dict], None] | None) -> None:
        while True:
            frame = channel.recv()
            if isinstance(frame, bytes):
                kind, first = (int.from_bytes(part, "big") for part in (frame[:4], frame[4:8]))
                if kind == PREVIEW:
                    result["previews"].append(frame[8:])
                elif kind == TEXT:
                    node, text = (part.decode() for part in (frame[8 : 8 + first], frame[8 + first :]))
                    result["lines"].setdefault(node, []).append(text)
                continue
            event = json.loads(frame)
            kind, data = event["type"], event["data"]
            if data.get("prompt_id", result["prompt_id"]) != result["prompt_id"]:
                continue
            result["events"].append(event)
            if on_event:
                on_event(event)
            if kind in ("execution_success", "execution_error", "execution_interrupted"):
                result["status"] = kind.removeprefix("execution_")
                result["error"] = data if kind == "execution_error" else None
            # The host files the history before this message, and after the status.
            if kind == "executing" and data["node"] is None and result["status"] != "invalid":
                return

    def interrupt(self) -> None:
        self.request("/interrupt", {})

    def image(self, ref: dict) -> Image.Image:
        """The picture behind one entry of ``outputs[node]["images"]``."""
        return Image.open(io.BytesIO(self.request("/view?" + urllib.parse.urlencode(ref))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Starts a ComfyUI with this pack; Ctrl+C ends it.")
    parser.add_argument("--host", type=Path, required=True, help="folder of a ComfyUI")
    parser.add_argument("--base", type=Path, required=True, help="folder for models, inputs and outputs")
    parser.add_argument("--cpu", action="store_true", help="keep off the GPU")
    options = parser.parse_args()
    import torch

    with Server(options.host, options.base, cpu=options.cpu or not torch.cuda.is_available()) as server:
        print(f"ComfyUI with this pack: {server.url}\nmodels, inputs and outputs: {server.base}\nCtrl+C ends it.")
        try:
            server.process.wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
