from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palf_dist import config as schema
from palf_dist.architecture_config import ConvConfig, MLPConfig, ResNetConfig, TransformerConfig
from palf_dist.config import RunConfig
from palf_dist.config_loading import config_differences, dump_config, load_config, parse_config
from palf_dist.errors import ConfigError
from palf_dist.tasks.suites import load_suite, suite_overrides

DATA = "data: {train: [breast_cancer, wine], held_out: [iris]}\n"
CONFIGS = Path(__file__).parent.parent / "configs"


def refused(text: str, *overrides: str) -> list[str]:
    """The lines of the one message that a wrong configuration gets."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "run.yaml", overrides)
    return str(caught.value).splitlines()


RUN_CONFIGS = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.name.startswith(("tune-", "ablations"))]
"""The others are configurations of searches, and variants."""


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_reloads_equal(path: Path) -> None:
    suite = suite_overrides(load_suite("palf12"), "0") if path.name == "palf12.yaml" else ()  # it has no data itself
    config = load_config(path, suite)
    assert parse_config(dump_config(config), "dumped") == config


@pytest.mark.parametrize(
    ("yaml", "line"),
    [
        ("inner: {stesp: 3}", "inner.stesp: unknown key; did you mean inner.steps?"),
        ("estimatr: {kind: es}", "estimatr: unknown key; did you mean estimator?"),
        (
            "policy: {shield: 0.5, basis: [focal, robust_ce]}",
            "policy: shield mixes alpha towards ce, which basis leaves out; add ce to basis",
        ),
        ("policy: {shield: 0.0}", "policy.shield: must be greater than 0, not 0.0"),
        ("policy: {shield: 1.5}", "policy.shield: must be less than or equal to 1, not 1.5"),
        ("outer_loss: {stability: -1.0}", "outer_loss.stability: must be greater than or equal to 0, not -1.0"),
        (
            "checkpoint: {colour: red}",
            "checkpoint.colour: unknown key; known here: every, keep",
        ),
        (
            "tasks: {architectures: [{kind: mlp}, {kind: conv, chanels: [8]}]}",
            "tasks.architectures.1.chanels: unknown key; did you mean tasks.architectures.1.channels?",
        ),
        (
            "tasks: {architectures: [{kind: rnn}]}",
            "tasks.architectures.0.kind: must be 'mlp' or 'conv' or 'resnet' or 'transformer' or 'module', not \"rnn\"",
        ),
        (
            "tasks: {architectures: [{hidden: [8]}]}",
            "tasks.architectures.0.kind: must be 'mlp' or 'conv' or 'resnet' or 'transformer' or 'module', not null",
        ),
        (
            "tasks: {architectures: [{kind: mlp, hidden: [8, 0]}]}",
            "tasks.architectures.0.hidden.1: must be greater than or equal to 1, not 0",
        ),
        (
            "tasks: {architectures: [mlp]}",
            "tasks.architectures.0: must be a section of 'key: value' lines, not \"mlp\"",
        ),
        ("tasks: {noise: {high: 1.5}}", "tasks.noise.high: must be less than or equal to 1, not 1.5"),
        ("tasks: {noise: {low: 0.9, high: 0.2}}", "tasks.noise: low (0.9) must not exceed high (0.2)"),
        ("tasks: {imbalance: {low: 9, high: 2}}", "tasks.imbalance: low (9.0) must not exceed high (2.0)"),
        ("tasks: {train_size: [9, 3]}", "tasks: train_size: the smallest (9) must not exceed the largest (3)"),
        ("tasks: {train_size: [9]}", "tasks.train_size.1: is required"),
        (
            "tasks: {optimisers: []}",
            "tasks.optimisers: list should have at least 1 item after validation, not 0, not []",
        ),
        ("tasks: {optimisers: [rmsprop]}", "tasks.optimisers.0: must be 'sgd', 'momentum' or 'adam', not \"rmsprop\""),
        ("inner: {learning_rate: fast}", "inner.learning_rate: must be a valid number or 'tuned', not \"fast\""),
        ("inner: {learning_rate: -1}", "inner.learning_rate: must be greater than 0 or 'tuned', not -1"),
        ("inner: {weight_decay: .nan}", "inner.weight_decay: must be a finite number or 'tuned', not NaN"),
        ("inner: {steps: true}", "inner.steps: must be a valid integer, not true"),
        ("inner: {steps: '20'}", 'inner.steps: must be a valid integer, not "20"'),
        ("inner: {steps: 2.5}", "inner.steps: must be a valid integer, not 2.5"),
        ("meta_learner: {clip: .inf}", "meta_learner.clip: must be a finite number, not Infinity"),
        ("meta_learner: {outer_steps: -1}", "meta_learner.outer_steps: must be greater than or equal to 1, not -1"),
        ("tracking: {enabled: 1}", "tracking.enabled: must be a valid boolean, not 1"),
        ("tracking: null", "tracking: must be a section of 'key: value' lines, not null"),
        ("name: a/b", "name: String should match pattern '^[\\w.-]+$', not \"a/b\""),
        (
            "estimator: {kind: es, task_clip: 1.0}",
            "estimator.task_clip: es has no gradients of single tasks; leave it out, or choose estimator.kind: adjoint",
        ),
        ("estimator: {window: 200}", "estimator.window: must be at most inner.steps (150), not 200; or leave it out"),
        (
            "estimator: {window: 50}\ndistributed: {mode: async}",
            "distributed.mode: must be sync where estimator.window is given: inner states are carried over",
        ),
        ("evaluation: {imbalance: 1}", "evaluation.imbalance: must be greater than 1, not 1"),
        (
            "evaluation: {noise_rates: [0.1, 0.3, 0.30000001]}",
            "evaluation.noise_rates: 0.3 is named more than once; name it once",
        ),
        (
            "evaluation: {conditions: [balanced, balanced]}",
            "evaluation.conditions: balanced is named more than once; name it once",
        ),
        ("policy: {features: [time, time]}", "policy.features: time is named more than once; name it once"),
        ("policy: {basis: [ce, focal, ce]}", "policy.basis: ce is named more than once; name it once"),
        ("policy: {hyperparameters: [wd, wd]}", "policy.hyperparameters: wd is named more than once; name it once"),
        (
            "inner: {grids: {adam: {learning_rate: [], weight_decay: [0.0]}}}",
            "inner.grids.adam.learning_rate: list should have at least 1 item after validation, not 0, not []",
        ),
        (
            "inner: {grids: {adam: {learning_rate: [0.1], weight_decay: []}}}",
            "inner.grids.adam.weight_decay: list should have at least 1 item after validation, not 0, not []",
        ),
        ("policy: {start: {gama: 1.0}}", "policy.start.gama: unknown key; did you mean policy.start.gamma?"),
        ("policy: {start: {e: 0.95}}", "policy.start.e: must be less than 0.95, not 0.95"),
        ("policy: {start: {eps: 0.5}}", "policy.start.eps: must be less than 0.5, not 0.5"),
        ("policy: {start: {tau: 0}}", "policy.start.tau: must be greater than 0, not 0"),
        ("outer_loss: {beta: -1}", "outer_loss.beta: must be greater than or equal to 0, not -1"),
        ("policy: {features: [tiem]}", "policy.features.0: unknown feature 'tiem'; did you mean time?"),
        (
            "policy: {kind: schedule, features: [time, loss]}",
            "policy.features: time, loss given, but a schedule policy reads time alone; leave it out, or choose "
            "policy.kind: robust",
        ),
        (
            "policy: {kind: maml, features: [time]}",
            "policy.features: a maml policy reads its own validation loss alone; leave it out, or choose policy.kind: "
            "robust",
        ),
        (
            "policy: {kind: validation_free, features: [loss_gap]}",
            "policy.features: loss_gap read validation rows, which policy.kind: validation_free rules out; leave them "
            "out, or choose policy.kind: robust",
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(yaml: str, line: str) -> None:
    assert refused(DATA + yaml) == [f"run.yaml: {line}"]


@pytest.mark.parametrize(
    ("yaml", "line"),
    [
        ("", "data: is required"),
        (
            "data: {train: [], held_out: [iris]}",
            "data.train: list should have at least 1 item after validation, not 0, not []",
        ),
        ("data: {train: wine, held_out: [iris]}", 'data.train: must be a valid list, not "wine"'),
        ("data: {train: [3], held_out: [iris]}", "data.train.0: must be a section of 'key: value' lines, not 3"),
        ("data: {train: [{path: x}], held_out: [iris]}", "data.train.0.name: is required"),
        (
            "data: {train: [wine, iris], held_out: [iris]}",
            "data: iris is named more than once; a held-out dataset must not be trained on",
        ),
    ],
)
def test_wrong_data_sections(yaml: str, line: str) -> None:
    assert refused(yaml) == [f"run.yaml: {line}"]


def test_all_errors_come_in_one_message() -> None:
    lines = refused(DATA + "inner: {steps: 0}\ntasks: {noise: {low: -1}}\nx: 1", "checkpoint.keep=0")
    assert len(lines) == 4
    assert "--set: checkpoint.keep: must be greater than or equal to 1, not 0" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "run.yaml, line 2, column 1: key 'a' is there twice (first on line 1): keep one"),
        ("a: [1", "run.yaml, line 1, column 6: expected ',' or ']', but got '<stream end>'"),
        ("a: !!python/object:os.system x", "run.yaml, line 1, column 4: could not determine a constructor"),
        ("1: x", "run.yaml, line 1, column 1: key 1 must be text: put it in quotes"),
        ("- 1", "run.yaml: must hold sections of 'key: value' lines, not [1]"),
        ("a: \x00", "run.yaml: not YAML"),
    ],
)
def test_files_that_are_no_configuration(text: str, message: str) -> None:
    (line,) = [line for line in refused(text) if line.startswith("run.yaml")]
    assert line.startswith(message)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read \(No such file or directory\); name a YAML file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_set_writes_any_field() -> None:
    config = parse_config(
        DATA,
        "run.yaml",
        [
            "inner.learning_rate=1e-3",
            "tasks.architectures.0.hidden=[32, 16]",
            "tasks.architectures.1.kind=conv",
            "data.train.1=digits",
            "tasks.train_size.0=80",
            "name=a",
            "tracking.uri=sqlite:///x=y.db",
            "policy.start.gamma=3",
            "outer_loss.information=0.5",
        ],
    )
    assert config.inner.learning_rate == 0.001
    assert [architecture.kind for architecture in config.tasks.architectures] == ["mlp", "conv"]
    assert config.tasks.architectures[0].hidden == (32, 16)  # type: ignore[union-attr]
    assert [source.name for source in config.data.train] == ["breast_cancer", "digits"]
    assert config.tasks.train_size == (80, 400)
    assert config.name == "a"
    assert config.tracking.uri == "sqlite:///x=y.db"
    assert config.policy.start == schema.PolicyStart(gamma=3.0) and config.outer_loss.information == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner", "--set inner: write it as field=value, for instance --set inner.steps=200"),
        ("inner..steps=3", "--set inner..steps=3: write it as field=value, for instance --set inner.steps=200"),
        ("inner.stepz=4", "--set: inner.stepz: unknown key; did you mean inner.steps?"),
        ("inner.steps=many", '--set: inner.steps: must be a valid integer, not "many"'),
        ("name.x=3", '--set: name: must be a valid string, not {"x": 3}'),
        ("data.train=[wine", "--set data.train, line 1, column 6: expected ',' or ']', but got '<stream end>'"),
        (
            "data.train.0.path=x",
            "--set data.train.0.path: data.train.0 is \"breast_cancer\", which has no field 'path'",
        ),
        (
            "tasks.architectures.5.kind=mlp",
            "--set tasks.architectures.5.kind: tasks.architectures is a list of 1: name an entry by its number, "
            "0 to 1, not '5'",
        ),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str) -> None:
    assert refused(DATA, override) == [message]


NAMES = st.text("abnoy.-_0123456789eEx", min_size=1, max_size=6)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\ufffe\uffff"))
NUMBERS = st.floats(1e-9, 1e9)
LISTS = st.lists(NUMBERS, min_size=1, max_size=3).map(tuple)
COUNTS = st.integers(1, 10**6)
SIZES = st.lists(st.integers(1, 512), min_size=1, max_size=3)


def sections(model: type[schema.Section], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Sections with some of the fields given, as a file may leave any of them out."""
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: model(**values))


ARCHITECTURES = st.one_of(
    sections(MLPConfig, hidden=SIZES, embedding=COUNTS),
    sections(ConvConfig, channels=SIZES.map(lambda sizes: [4 * size for size in sizes])),
    SIZES.map(lambda sizes: ResNetConfig(widths=tuple(4 * size for size in sizes), blocks=tuple(sizes))),
    sections(TransformerConfig, layers=COUNTS, length=st.integers(2, 99)),
)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    sources = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    columns = sections(schema.Columns, label=TEXTS, drop=st.lists(TEXTS, max_size=2))
    entries = [schema.DatasetSource(name=name, path=draw(st.none() | TEXTS), columns=draw(columns)) for name in sources]
    low = draw(st.floats(0, 1))
    return RunConfig(
        name=draw(NAMES),
        seed=draw(COUNTS),
        data=schema.DataConfig(train=tuple(entries[1:]), held_out=tuple(entries[:1]), cache=draw(st.none() | TEXTS)),
        tasks=schema.TasksConfig(
            noise=schema.NoiseConfig(low=low, high=draw(st.floats(low, 1))),
            architectures=tuple(draw(st.lists(ARCHITECTURES, min_size=1, max_size=3))),
        ),
        inner=draw(
            sections(
                schema.InnerConfig,
                learning_rate=NUMBERS | st.just("tuned"),
                grids=st.builds(
                    schema.GridsConfig, sgd=st.builds(schema.GridConfig, learning_rate=LISTS, weight_decay=LISTS)
                ),
            )
        ),
        policy=schema.PolicyConfig(start=draw(sections(schema.PolicyStart, e=st.floats(0.01, 0.9), tau=NUMBERS))),
        distributed=draw(sections(schema.DistributedConfig, address=TEXTS, unit_timeout=NUMBERS)),
        tracking=draw(sections(schema.TrackingConfig, uri=TEXTS, experiment=TEXTS, enabled=st.booleans())),
    )


@given(configs())
@settings(max_examples=150)
def test_a_dumped_config_reloads_equal(config: RunConfig) -> None:
    assert parse_config(dump_config(config), "dumped") == config


def test_differences_name_field_old_and_new_value() -> None:
    old = parse_config(DATA, "old")
    new = parse_config(DATA, "new", ["inner.steps=20", "tasks.noise.high=0.4"])
    assert config_differences(old, old) == []
    assert config_differences(old, new) == [
        "inner.steps: 150 in the run, 20 now",
        "tasks.noise.high: 0.6 in the run, 0.4 now",
    ]


def test_what_touches_no_result_may_differ() -> None:
    free = ["distributed.workers=7", "distributed.address=auto", "distributed.unit_timeout=9", "tracking.uri=x"]
    assert config_differences(parse_config(DATA, "old"), parse_config(DATA, "new", free)) == []
    bound = parse_config(DATA, "new", ["distributed.threads=2"])
    assert config_differences(parse_config(DATA, "old"), bound) == ["distributed.threads: 1 in the run, 2 now"]
