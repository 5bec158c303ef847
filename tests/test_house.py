"""The rules of the house that a machine can check: floors, what may not ship, names of nodes."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent
FLOORS = {"demo": 0, "kernels": 0, "carriers": 1, "host": 2, "nodes": 3}
COMFYUI = {
    "comfy",
    "comfy_api",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
    "utils",
}
REACH = {"nodes": {"comfy_api"}, "host": COMFYUI}
LIBRARIES = {"PIL", "einops", "kornia", "numpy", "safetensors", "torch"}
BANNED_MODULES = {
    "ctypes",
    "ftplib",
    "http",
    "importlib",
    "marshal",
    "multiprocessing",
    "pickle",
    "requests",
    "shelve",
    "smtplib",
    "socket",
    "ssl",
    "subprocess",
    "urllib",
    "webbrowser",
}
BANNED_CALLS = {"__import__", "compile", "eval", "exec", "os.execv", "os.popen", "os.startfile", "os.system"}
BANNED_READS = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
NODE_ID = re.compile(r"Concept[A-Z][a-z]+[A-Z]\w*")


def shipped() -> list[Path]:
    """Every Python file that ``.comfyignore`` leaves in the published pack."""
    left_out = tuple((PACK / ".comfyignore").read_text().split())
    files = [*PACK.glob("*.py"), *(path for floor in FLOORS for path in (PACK / floor).rglob("*.py"))]
    return sorted(
        path for path in (file.relative_to(PACK) for file in files) if not path.as_posix().startswith(left_out)
    )


def tree(path: Path) -> ast.Module:
    return ast.parse((PACK / path).read_text(encoding="utf-8"), str(path))


def defines_schema(item: ast.stmt) -> bool:
    return isinstance(item, ast.ClassDef) and any(getattr(part, "name", "") == "define_schema" for part in item.body)


FILES = shipped()
NODE_CLASSES = [
    (path, item) for path in FILES if path.parts[0] == "nodes" for item in tree(path).body if defines_schema(item)
]


def imports(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """(line, module path) of every import; relative ones start with "." and then run from the pack's root."""
    found = []
    for item in ast.walk(tree(path)):
        if isinstance(item, ast.Import):
            found += [(item.lineno, tuple(name.name.split("."))) for name in item.names]
        elif isinstance(item, ast.ImportFrom):
            start = (".", *path.parent.parts[: len(path.parent.parts) - item.level + 1]) if item.level else ()
            module = start + tuple((item.module or "").split(".") if item.module else ())
            found += [(item.lineno, (*module, name.name)) for name in item.names]
    return found


def dotted(item: ast.expr) -> str:
    return ast.unparse(item) if isinstance(item, ast.Attribute | ast.Name) else ""


def test_every_floor_ships():
    assert {path.parts[0] for path in FILES} >= {"__init__.py", *FLOORS}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_down(path):
    floor = path.parts[0] if len(path.parts) > 1 else "nodes"
    reach = REACH.get(floor, set())
    for line, module in imports(path):
        where = f"{path}:{line} imports {'.'.join(module)}"
        if module[0] == ".":
            assert len(module) > 1 and module[1] in FLOORS, f"{where}, which is on no floor"
            assert module[1] == floor or FLOORS[module[1]] < FLOORS[floor], f"{where}, which is not below {floor}/"
        elif module[0] in COMFYUI:
            assert module[0] in reach, f"{where}; {floor}/ may import {sorted(reach)} of ComfyUI"
        else:
            assert module[0] in LIBRARIES | sys.stdlib_module_names, f"{where}, which a host does not bring along"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_ships_needs_nothing_that_is_left_out(path):
    for line, module in imports(path):
        for file in (Path(*module[1:i]).with_suffix(".py") for i in range(2, len(module) + 1) if module[0] == "."):
            assert file in FILES or not (PACK / file).exists(), f"{path}:{line} imports {file}, which does not ship"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_that_ships_reaches_out(path):
    for line, module in imports(path):
        assert module[0] not in BANNED_MODULES, f"{path}:{line} imports {'.'.join(module)}"
    for item in ast.walk(tree(path)):
        where = f"{path}:{getattr(item, 'lineno', 0)}"
        assert dotted(item) not in BANNED_READS, f"{where} reads {dotted(item)}"
        if isinstance(item, ast.Call):
            assert dotted(item.func) not in BANNED_CALLS, f"{where} calls {dotted(item.func)}"
            if dotted(item.func) == "torch.load":
                safe = [k for k in item.keywords if k.arg == "weights_only" and getattr(k.value, "value", None) is True]
                assert safe, f"{where} calls torch.load without weights_only=True"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_source_is_cp1252(path):
    (PACK / path).read_bytes().decode("utf-8").encode("cp1252")


def test_ci_runs_what_the_readme_says():
    *_, command = (PACK / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    lines = (PACK / "README.md").read_text(encoding="utf-8").splitlines()
    assert command in [line.partition("  ")[0] for line in lines]


def test_help_pages_show_every_picture_beside_them():
    pages, pictures = ((PACK / "web" / "docs").glob(ending) for ending in ("*.md", "*.jpg"))
    shown = {name for page in pages for name in re.findall(r"!\[[^\]]+\]\((\S+)\)", page.read_text(encoding="utf-8"))}
    sizes = {file.name: file.stat().st_size for file in pictures}
    assert shown == sizes.keys() and max(sizes.values()) < 60_000


def test_there_are_nodes():
    assert NODE_CLASSES


@pytest.mark.parametrize("path, item", NODE_CLASSES, ids=[item.name for _, item in NODE_CLASSES])
def test_node_is_found_by_readers_of_source(path, item):
    assert [dotted(base) for base in item.bases] == ["io.ComfyNode"], f"{item.name} must inherit io.ComfyNode directly"
    ids = [
        k.value
        for call in ast.walk(item)
        if isinstance(call, ast.Call) and dotted(call.func) == "io.Schema"
        for k in call.keywords
        if k.arg == "node_id"
    ]
    assert len(ids) == 1 and isinstance(ids[0], ast.Constant), f"{item.name} needs one literal io.Schema(node_id=...)"
    assert NODE_ID.fullmatch(ids[0].value), f"{ids[0].value} is not Concept<Verb><Noun>"
