"""Imports point downward only; heavy libraries are imported late; the package never imports torch, pickle or eval."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "itune"

# one row a floor, top first; a module may import from its own floor or from a lower one
FLOORS = [
    ("cli", "usage", "__main__"),
    ("demo", "verify"),
    ("loop", "plan", "export", "report", "chat", "setup_run", "saved_run", "judge", "weights", "run_record",
     "start_run", "run_source", "at_hand", "ahead", "kept_step", "targets"),
    ("evaluators", "checkpoint", "runtime", "feed", "progress", "skipped"),
    ("step",),
    ("objectives", "optim", "optax_optimizer", "decode", "flops", "tuning", "spikes"),
    ("models", "data"),
    ("sharding", "config", "data_section", "writers", "rounding", "storage", "xla"),
    ("types",),
]
FLOOR_OF = {name: len(FLOORS) - index for index, names in enumerate(FLOORS) for name in names}
FORBIDDEN = {"torch", "pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE = {"os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load", "marshal.loads", "shelve.open",
          "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "tempfile.mktemp", "jax.profiler.start_server",
          "subprocess.getoutput", "subprocess.getstatusoutput"}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _room(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in FLOOR_OF, f"itune/{own} stands on no floor: add it to FLOORS"
    for name in _imports(path):
        room = _room(name) if name.startswith("itune.") else ""
        if room and room in FLOOR_OF and room != own:
            assert FLOOR_OF[room] <= FLOOR_OF[own], f"{path.name} imports itune.{room}, which is above it"
            assert {room, own} != {"models", "data"}, "models and data never import each other"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unsafe_and_no_torch(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}, f"{path}: {node.func.id}()"
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert dotted not in UNSAFE, f"{path}: {dotted}"
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is True:
            assert node.arg not in {"shell", "trust_remote_code", "allow_pickle"}, f"{path}: {node.arg}=True"
    for name in _imports(path):
        assert name.split(".")[0] not in FORBIDDEN, f"{path} imports {name}"


def test_import_itune_is_cheap():
    heavy = ("jax", "transformers", "datasets", "rich", "ml_collections")
    code = f"import sys, itune, itune.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]", f"`import itune` already imports {out}"
