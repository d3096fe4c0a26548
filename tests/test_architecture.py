from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import palf_dist

PACKAGE = Path(palf_dist.__file__).parent
ROOT = PACKAGE.parent
MODULES = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = sorted([*MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

ORDER = (
    "redaction",
    "sections",
    "errors",
    "randomness",
    "containment",
    "learnloss",
    "types",
    "own_losses",
    "usage",
    "faults",
    "atomic",
    "storage",
    "mlflow_client",
    "model_registry",
    "architecture_config",
    "config",
    "losses",
    "early_learning",
    "contrastive",
    "logit_losses",
    "loss_head",
    "untraced",
    "user_warnings",
    "mixture_loss",
    "soft_targets",
    "cross_entropy_arguments",
    "row_mixture",
    "data_parallel",
    "training_state",
    "shown_rows",
    "policies",
    "explanation",
    "config_loading",
    "run_directory",
    "storage_lease",
    "storage_mirror",
    "workplace",
    "prediction_averages",
    "graph_curvature",
    "class_priors",
    "snapshots",
    "adaptive_loss",
    "testing",
    "inner_models",
    "inner_optimisers",
    "tasks",
    "outer_loss",
    "shield",
    "adaptation",
    "inner_steps",
    "compilation",
    "inner_loop",
    "trajectory",
    "estimators",
    "meta_learner",
    "metrics_log",
    "checkpoint",
    "tracking_spool",
    "tracking_delivery",
    "tracking",
    "evaluation",
    "group_work",
    "task_search",
    "rehearsal",
    "memory",
    "preparation",
    "units",
    "progress",
    "distributed",
    "ablations",
    "search",
    "doctor",
    "jobs",
    "cli_shared",
    "cli_tune",
    "cli_jobs",
    "cli_doctor",
    "cli_results",
    "cli_ablate",
    "cli_policy",
    "cli",
    "__main__",
)
"""The modules and packages of palf_dist, as DESIGN.md lists them: each may import only those before it."""


def imports(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the direction"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def test_every_module_has_its_place() -> None:
    assert {layer(module) for module in MODULES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way(module: Path) -> None:
    if layer(module) == "__init__":
        pytest.skip("the package's own __init__ may name anything")
    own = ORDER.index(layer(module))
    for name in imports(MODULES[module]):
        if name.startswith("palf_dist."):
            target = name.split(".")[1]
            if target != "__version__":
                assert ORDER.index(target) <= own, f"{module} imports palf_dist.{target}, which comes after it"


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("ray", {"distributed", "search", "doctor", "jobs"}),
        ("ray.tune", {"search"}),
        ("mlflow", {"mlflow_client", "model_registry", "tracking_delivery"}),
        (
            "typer",
            {"cli", "cli_shared", "cli_tune", "cli_jobs", "cli_doctor", "cli_results", "cli_ablate", "cli_policy"},
        ),
    ],
)
def test_few_places_know_the_library(library: str, owners: set[str]) -> None:
    users = {
        layer(module)
        for module, path in MODULES.items()
        if any(f"{name}.".startswith(f"{library}.") for name in imports(path))
    }
    assert users == owners


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


UNPICKLERS = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal", "jsonpickle", "ray.cloudpickle"}
LOADERS = {"torch.load", "torch.jit.load", "torch.package", "np.load", "numpy.load", "np.fromfile", "yaml.unsafe_load"}
WORDS = {"read_pickle", "load_model", "Tuner", "eval", "exec", "allow_pickle", "weights_only"}
HARMLESS = {("palf_dist/tasks/converters.py", "read_pickle")}
"""A data package of the index, read only after its sha256 was found to be the one in tasks/registry.py."""


def mentions(path: Path) -> Iterator[str]:
    """Modules imported, dotted names used (whole, and their last part) and keywords given in a file."""
    yield from (name.split(".")[0] for name in imports(path))
    yield from imports(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
            yield ast.unparse(node).rpartition(".")[2]
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def test_nothing_reads_pickle() -> None:
    programs = [path for folder in ("palf_dist", "jobs", "cluster") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in programs
        for name in set(mentions(path)) & (UNPICKLERS | LOADERS | WORDS)
    }
    assert found == HARMLESS


def test_yaml_makes_plain_data_only() -> None:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load":
                assert (
                    ast.unparse(node.keywords[0]) == "Loader=_Loader" and "_Loader(yaml.SafeLoader)" in path.read_text()
                )
