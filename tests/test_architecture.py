"""The house rules of DESIGN.md, read from the source: who imports whom, how big things are, what may not be written."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {  # each may import itself and what stands above it here
    "pure": ("diffusion photos photo_checks smart_crop buckets captions grids metrics statistics step_choice diagnosis errors randomness"),
    "parts": (
        "base lab adapters averaging objective priors optimization encoders clip_dino perceptual samplers photo_folder side_files caches "
        "dreambench tokens files claims ranks"
    ),
    "page": "config cross_checks recipes",
    "after": (
        "live_storage memory memory_cuts sharding preflight metrics_csv runs taken_over class_bank class_images subject_photos generation evaluation "
        "base_images worked_out scoring lab_truth reference_rows final_scores rescoring arms combined_scores interop"
    ),
    "train": "data module sharded_strategy fixed_loss finite_loss callbacks first_steps mirror",
    "faces": "cli sweeps summary report dashboard studio __main__",
    "scripts": "train evaluate generate",
}
ORDER = list(LAYERS)
HEAVY = ("diffusers", "transformers", "wandb", "wandb_workspaces", "matplotlib", "gradio", "accelerate")  # seconds to import: only where needed
ONLY_IN = {  # third-party name -> layers, or modules, that may import it
    "pytorch_lightning": ("train", "scripts"),
    "lightning": (),
    "wandb": ("scripts", "dreambooth.mirror", "dreambooth.dashboard"),
    "wandb_workspaces": ("dreambooth.dashboard",),
    "hydra": ("scripts", "dreambooth.cli", "dreambooth.sweeps"),
    "torchvision": (),
}
FORBIDDEN_NAMES = {"utils", "util", "core", "common", "components", "helpers", "helper", "misc"}
TEXT = {".py", ".yaml", ".yml", ".toml", ".cfg", ".json", ".md", ".txt", ".sh", ".ipynb", ".lock", ".html", ""}
MAX_CONF_FILES, MAX_STEP_LINES = 10, 14

PACKAGE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sorted((ROOT / "dreambooth").rglob("*.py"))
}
SCRIPTS = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
MODULES = PACKAGE | SCRIPTS


class Import(NamedTuple):
    """One imported name: dotted, the line, and whether it is imported as soon as its module is."""

    name: str
    line: int
    at_top: bool


def layer(module: str) -> str | None:
    """The layer of `dreambooth.base.hub` is that of `base`; None for a module that no layer names."""
    if module in SCRIPTS:
        return "scripts"
    part = module.split(".")[1] if "." in module else ""
    return next((name for name, members in LAYERS.items() if part in members.split() and name != "scripts"), None)


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(source: ast.Module, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every imported dotted name; `from dreambooth import cli` counts as dreambooth.cli, relative ones are spelled out."""
    top = {id(node) for node in _at_import_time(source)}
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            names = [f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in PACKAGE else origin for alias in node.names]
        else:
            continue
        yield from (Import(name, node.lineno, id(node) in top) for name in dict.fromkeys(names))


def _at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: not those in functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _at_import_time(child)


def imports_of(module: str) -> list[Import]:
    return list(imports(tree(module), module, MODULES[module].name == "__init__.py"))


def upward(module: str, found: list[Import]) -> list[str]:
    """One sentence for each import that goes up."""
    own = layer(module)
    broken = []
    for name, line, _ in found:
        other = layer(name) if name in MODULES else None
        if other and own and ORDER.index(other) > ORDER.index(own):
            broken.append(f"{module}:{line} ({own}) imports {name} ({other}); a layer may import itself and those below, move what both need down")
    return broken


@pytest.mark.parametrize("module", [name for name in PACKAGE if name != "dreambooth"])
def test_architecture_every_module_is_in_a_layer(module: str) -> None:
    assert layer(module), f"{module} is in no layer; add it to LAYERS here and to DESIGN.md, in the lowest layer that its imports allow"


@pytest.mark.parametrize("module", MODULES)
def test_architecture_imports_go_downwards_only(module: str) -> None:
    assert not (broken := upward(module, imports_of(module))), "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("dreambooth.diffusion", "from dreambooth.config import Config"),
        ("dreambooth.base.hub", "from dreambooth import config"),
        ("dreambooth.base.hub", "from ..config import Config"),
        ("dreambooth.adapters.methods", "def f():\n    import dreambooth.data"),
        ("dreambooth.runs", "from dreambooth.cli import explain"),
        ("dreambooth.cli", "import train"),
    ],
)
def test_architecture_check_sees_an_import_that_goes_up(module: str, line: str) -> None:
    assert upward(module, list(imports(ast.parse(line), module))), f"{line} in {module} went through"


def test_architecture_check_lets_an_import_that_goes_down_pass() -> None:
    assert not upward("dreambooth.module", list(imports(ast.parse("from dreambooth.diffusion import velocity"), "dreambooth.module")))


def test_architecture_check_knows_a_module_in_no_layer() -> None:
    assert layer("dreambooth.brand_new") is None


@pytest.mark.parametrize("module", MODULES)
def test_architecture_frameworks_stay_in_their_layers(module: str) -> None:
    for name, line, _ in imports_of(module):
        allowed = ONLY_IN.get(name.split(".")[0])
        if allowed is not None:
            where = ", ".join(allowed) or "nobody"
            assert layer(module) in allowed or module in allowed, f"{module}:{line} imports {name}, which only {where} may"


def test_architecture_hydra_main_is_in_scripts_only() -> None:
    found = [name for name in PACKAGE if re.search(r"hydra\.main|from hydra import .*\bmain\b", MODULES[name].read_text(encoding="utf-8"))]
    assert not found, f"{found} must leave hydra.main to the scripts"


def test_architecture_trainer_is_made_in_scripts_only() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name in PACKAGE
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Trainer", "pl.Trainer", "pytorch_lightning.Trainer")
    ]
    assert not found, f"{found} must leave the Trainer to the scripts"


@pytest.mark.parametrize("module", PACKAGE)
def test_architecture_heavy_packages_are_imported_where_they_are_needed(module: str) -> None:
    for name, line, at_top in imports_of(module):
        heavy = name.split(".")[0] in HEAVY
        assert not (heavy and at_top), f"{module}:{line} imports {name} at its top; move it into the function, so that a config error answers at once"


def test_architecture_the_config_comes_without_the_heavy_packages() -> None:
    code = f"import sys, dreambooth.cli, dreambooth.recipes; print(*sorted(set({HEAVY + ('pytorch_lightning',)!r}) & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert answer.stdout.split() == []


def test_architecture_needs_no_torchvision() -> None:
    assert importlib.util.find_spec("torchvision") is None, "torchvision is here, so these tests cannot show that the program does without it"


def test_architecture_has_no_drawer_names() -> None:
    names = {path.stem for folder in ("dreambooth", "conf", "tests", "experiments") for path in (ROOT / folder).rglob("*")}
    assert not names & FORBIDDEN_NAMES, "name files and folders by what is in them"


@pytest.mark.parametrize("module", [name for name, path in PACKAGE.items() if path.name == "__init__.py"])
def test_architecture_init_files_export_nothing_again(module: str) -> None:
    for node in tree(module).body:
        text = ast.unparse(node)
        allowed = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # the docstring
        allowed |= text.startswith("__version__ =") or text == "import os" or text.startswith("os.environ")
        assert allowed, f"{MODULES[module].relative_to(ROOT)}:{node.lineno} holds more than a docstring, a version and os.environ lines: {text}"


@pytest.mark.parametrize("module", MODULES)
def test_architecture_nothing_runs_code_from_a_file(module: str) -> None:
    assert not (found := unsafe_calls(tree(module), module)), "\n".join(found)


def unsafe_calls(source: ast.Module, module: str) -> list[str]:
    """One sentence for each call that would run what a file or a string says."""
    found = []
    for node in ast.walk(source):
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        place = f"{module}:{node.lineno} {called}"
        if called in ("eval", "exec") or re.search(r"(pickle|dill|marshal|joblib|shelve)\.(load|loads|Unpickler|open|dump|dumps|Pickler)$", called):
            found.append(f"{place} must not be called; use JSON or safetensors")
        if called in ("torch.load", "load_from_checkpoint") or called.endswith(".load_from_checkpoint"):
            if options.get("weights_only") != "True":
                found.append(f"{place} must say weights_only=True")
        if options.get("allow_pickle") == "True" or options.get("trust_remote_code") == "True" or options.get("shell") == "True":
            found.append(f"{place} must not trust what it reads")
        if called in ("yaml.load", "hydra.utils.instantiate", "instantiate", "importlib.import_module"):
            found.append(f"{place} must not turn text into objects")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "pickle.load(f)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "hydra.utils.instantiate(c)",
    ],
)
def test_architecture_check_sees_a_call_that_runs_code(line: str) -> None:
    assert unsafe_calls(ast.parse(line), "example")


def test_architecture_check_lets_safe_calls_pass() -> None:
    assert not unsafe_calls(ast.parse("base.eval(); torch.load(p, weights_only=True); json.load(f)"), "example")


def training_step() -> ast.FunctionDef:
    return next(node for node in ast.walk(tree("dreambooth.module")) if isinstance(node, ast.FunctionDef) and node.name == "training_step")


def test_architecture_training_step_fits_one_screen() -> None:
    step = training_step()
    lines = MODULES["dreambooth.module"].read_text(encoding="utf-8").splitlines()[step.lineno - 1 : step.end_lineno]
    code = [line for line in lines if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= MAX_STEP_LINES, f"training_step has {len(code)} lines of code; say it in {MAX_STEP_LINES}"


def test_architecture_the_loss_is_two_hops_from_train() -> None:
    """train.py makes DreamBoothModule; its training_step calls the loss itself."""
    assert "DreamBoothModule(" in SCRIPTS["train"].read_text(encoding="utf-8")
    called = {ast.unparse(node.func) for node in ast.walk(training_step()) if isinstance(node, ast.Call)}
    assert "prior_preservation_loss" in called
    assert "dreambooth.diffusion" in [name for name, _, _ in imports_of("dreambooth.module")]


def test_architecture_has_few_config_files() -> None:
    """Experiments are not counted: each is one file, by design."""
    files = [path for ending in ("*.yaml", "*.yml") for path in (ROOT / "conf").rglob(ending) if path.parent.name != "experiment"]
    assert len(files) <= MAX_CONF_FILES, f"conf/ has {len(files)} files beside the experiments; settings belong in dreambooth/config.py"


def text_files() -> list[Path]:
    """What git would keep: tracked, and untracked but not ignored; everything outside a checkout."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        hidden = re.compile(r"/(\.[^/]+|__pycache__|runs|build|dist)/")
        files = [path for path in ROOT.rglob("*") if not hidden.search(f"/{path.relative_to(ROOT)}")]
    return [path for path in files if path.is_file() and path.suffix in TEXT]


MACHINE_PATH = re.compile(r"(?<![\w.:/\-])/(?:" + "work|root|home|tmp" + r")/")


def test_architecture_names_no_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "write paths relative to the repository:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("folder", "text", "is_machine"),
    [("tmp", "open('/{}/x')", True), ("home", "see /{}/me/a", True), ("home", "https://a.b/{}/x", False), ("tmp", "a/{}/b", False)],
)
def test_architecture_check_sees_a_machine_path(folder: str, text: str, is_machine: bool) -> None:
    assert bool(MACHINE_PATH.search(text.format(folder))) == is_machine
