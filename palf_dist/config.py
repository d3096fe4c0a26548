"""The validated configuration of a run: one YAML file <-> one object. Field names are the paths of ``--set``."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, FiniteFloat, field_validator, model_validator

from palf_dist.architecture_config import Architecture, MLPConfig
from palf_dist.own_losses import refuse_own
from palf_dist.sections import Count, Decay, NonNegative, Positive, Section, Share, distinct
from palf_dist.types import BASIS_LOSSES, HYPERPARAMETERS

BasisName = Literal[
    "ce",
    "focal",
    "label_smoothing",
    "symmetric_ce",
    "info_nce",
    "robust_ce",
    "generalised_ce",
    "mae",
    "elr",
    "bootstrap",
]
HyperparameterName = Literal["e", "la", "ew", "wd", "gamma", "eps", "a", "b", "tau", "q", "lam", "beta"]
Family = Literal["image", "text", "tabular"]
NoiseKind = Literal["uniform", "pair_flip", "class_dependent", "instance_dependent"]
MOST_WRONG = 0.5  # no class or example is mislabelled as often by the last two: its true label stays the likeliest
assert get_args(BasisName) == BASIS_LOSSES and get_args(HyperparameterName) == HYPERPARAMETERS


class Columns(Section):
    """Roles of the columns of a table. What is not named is found from the schema."""

    label: str | None = None
    image: str | None = None
    text: str | None = None
    numeric: tuple[str, ...] | None = None
    categorical: tuple[str, ...] | None = None
    drop: tuple[str, ...] = ()


class DatasetSource(Section):
    """A dataset: a registry name, or any Parquet path (local, s3://, gs://, hf://; a folder or a glob is joined)."""

    name: str
    path: str | None = Field(default=None, description="Parquet path; leave out for a dataset of the registry")
    columns: Columns = Columns()
    family: Family | None = Field(default=None, description="refused if it is another one")


class DataConfig(Section):
    train: tuple[DatasetSource, ...] = Field(min_length=1, description="datasets the policy is meta-trained on")
    held_out: tuple[DatasetSource, ...] = Field(min_length=1, description="datasets it is judged on, never trained on")
    cache: str | None = Field(default=None, description="cache folder; default $PALF_CACHE, else ./.palf_cache")
    max_rows: Count = Field(default=20_000, description="rows kept of a larger dataset (a fixed random sample)")
    max_classes: Annotated[int, Field(strict=True, ge=2)] = Field(
        default=64, description="datasets with more classes are refused"
    )

    @field_validator("train", "held_out", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        if isinstance(value, (list, tuple)):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="after")
    def _disjoint(self) -> DataConfig:
        names = [source.name for source in self.train + self.held_out]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named more than once; a held-out dataset must not be trained on")
        return self


class NoiseConfig(Section):
    """Label noise of training and validation rows. ``uniform`` resamples over all k classes, the true one included;
    ``pair_flip`` moves class y to y + 1 mod k. ``class_dependent`` draws a transition matrix for each task, and with
    ``instance_dependent`` rate and wrong label depend on the inputs; there a rate is the share of wrong labels."""

    kind: NoiseKind = "uniform"
    clean_share: Share = Field(default=0.25, description="share of tasks with no noise")
    low: Share = 0.05
    high: Share = 0.6

    @model_validator(mode="after")
    def _order(self) -> NoiseConfig:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self


class ImbalanceConfig(Section):
    """Class imbalance of training rows: exponential profile with the given largest : smallest ratio."""

    balanced_share: Share = Field(default=0.5, description="share of tasks left as the data is")
    low: Annotated[FiniteFloat, Field(strict=True, ge=1)] = 3.0
    high: Annotated[FiniteFloat, Field(strict=True, ge=1)] = 10.0
    uniform_target_share: Share = Field(default=0.5, description="share of imbalanced tasks judged on balanced rows")

    @model_validator(mode="after")
    def _order(self) -> ImbalanceConfig:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self


class TasksConfig(Section):
    """The task family: what a task is drawn from."""

    train_size: tuple[Count, Count] = Field(default=(60, 400), description="smallest and largest, drawn log-uniformly")
    validation_share: Share = Field(default=0.25, description="noisy validation rows as a share of the training rows")
    meta_validation_size: Count = Field(default=128, description="clean rows that the outer loss reads")
    test_size: Count = 500
    noise: NoiseConfig = NoiseConfig()
    imbalance: ImbalanceConfig = ImbalanceConfig()
    architectures: tuple[Architecture, ...] = Field(default=(MLPConfig(),), min_length=1)
    optimisers: tuple[Literal["sgd", "momentum", "adam"], ...] = Field(default=("adam",), min_length=1)
    group_size: Count = Field(default=24, description="tasks that train side by side in one unit of work")
    families: Literal["mixed", "in_turn"] = Field(
        default="mixed",
        description="mixed: a task's dataset is any that is trained on; in_turn: a group has those of one family, and "
        "group after group the families take turns, so that each has its share of tasks however many datasets it has",
    )
    pool: Count | None = Field(
        default=None, description="groups of tasks that meta-training ever sees, in turn; none: new ones all the time"
    )

    @model_validator(mode="after")
    def _order(self) -> TasksConfig:
        low, high = self.train_size
        if low > high:
            raise ValueError(f"train_size: the smallest ({low}) must not exceed the largest ({high})")
        return self


class GridConfig(Section):
    learning_rate: tuple[Positive, ...] = Field(min_length=1)
    weight_decay: tuple[NonNegative, ...] = Field(min_length=1, description="decoupled: times the learning rate")


class GridsConfig(Section):
    """Where ``tuned`` values are looked for, for each inner optimiser."""

    sgd: GridConfig = GridConfig(learning_rate=(0.03, 0.1, 0.3, 1.0), weight_decay=(0.0, 0.003, 0.01, 0.03, 0.1))
    momentum: GridConfig = GridConfig(learning_rate=(0.003, 0.01, 0.03, 0.1), weight_decay=(0.0, 0.03, 0.1, 0.3, 1.0))
    adam: GridConfig = GridConfig(learning_rate=(0.001, 0.003, 0.006, 0.012), weight_decay=(0.0, 0.3, 1.0, 3.0, 10.0))


class InnerConfig(Section):
    """The inner loop. ``tuned``: chosen for plain cross-entropy on meta-training tasks and given to every method."""

    steps: Count = 150
    batch_size: Annotated[int, Field(strict=True, ge=2)] = 32
    learning_rate: Positive | Literal["tuned"] = "tuned"
    weight_decay: NonNegative | Literal["tuned"] = "tuned"
    grids: GridsConfig = GridsConfig()
    ema: Share = Field(default=0.7, description="decay of each example's averaged prediction")
    compile: bool = Field(
        default=False,
        strict=True,
        description="by inductor: a minute for each set of shapes, and a C++ compiler is needed",
    )


class PolicyStart(Section):
    """Loss hyper-parameters at the untrained policy; those that the policy does not set stay there. Left out:
    ``types.DEFAULT_HYPERPARAMETERS``. The ends of the ranges are excluded, so that a policy can move both ways."""

    e: Annotated[FiniteFloat, Field(strict=True, gt=0, lt=0.95)] | None = None
    la: Positive | None = None
    ew: Annotated[FiniteFloat, Field(strict=True, gt=0, lt=1)] | None = None
    wd: Positive | None = None
    gamma: Positive | None = None
    eps: Annotated[FiniteFloat, Field(strict=True, gt=0, lt=0.5)] | None = None
    a: Positive | None = None
    b: Positive | None = None
    tau: Positive | None = None
    q: Annotated[FiniteFloat, Field(strict=True, gt=0, lt=1)] | None = None
    lam: Positive | None = None
    beta: Annotated[FiniteFloat, Field(strict=True, gt=0, lt=1)] | None = None


assert tuple(PolicyStart.model_fields) == HYPERPARAMETERS


class PolicyConfig(Section):
    """Who sets the controls. Each kind is a preset: fields left out take its values; see docs/method.md."""

    kind: Literal[
        "robust", "informed", "validation_free", "recurrent", "schedule", "constant", "maml", "palf", "widened"
    ] = "robust"
    features: tuple[str, ...] | None = Field(default=None, description="state features; see palf_dist.training_state")
    basis: tuple[BasisName, ...] | None = Field(default=None, min_length=1, description="basis losses in the mixture")
    hyperparameters: tuple[HyperparameterName, ...] | None = Field(default=None, description="set by the policy")
    start: PolicyStart = PolicyStart()
    hidden: Count = 16
    refresh: Count = Field(default=10, description="inner steps between two evaluations of the policy")
    seed: Annotated[int, Field(strict=True)] = 0
    shield: Annotated[FiniteFloat, Field(strict=True, gt=0, le=1)] | None = Field(
        default=None,
        description="kappa of the Lyapunov shield (none: off); AdaptiveLoss refuses policies that have one",
    )

    _no_twins = field_validator("features", "basis", "hyperparameters")(distinct)

    @field_validator("basis", mode="before")
    @classmethod
    def _closed_forms(cls, names: object) -> object:
        if isinstance(names, list | tuple):
            refuse_own(names, "policy.basis")
        return names

    @model_validator(mode="after")
    def _shield_has_its_reference(self) -> PolicyConfig:
        if self.shield is not None and self.basis is not None and "ce" not in self.basis:
            raise ValueError("shield mixes alpha towards ce, which basis leaves out; add ce to basis")
        return self


class EstimatorConfig(Section):
    kind: Literal["adjoint", "unroll", "one_step", "es", "pes"] = "adjoint"
    window: Count | None = Field(default=None, description="inner steps of a truncated window; none: the whole run")
    pairs: Count = Field(default=4, description="antithetic pairs of es and pes")
    sigma: Positive = Field(default=0.05, description="standard deviation of the perturbations of es and pes")
    task_clip: Positive | None = Field(
        default=None,
        description="largest norm of one task's gradient with respect to the controls that the policy sets, in each "
        "window, of adjoint and one_step; none: no limit",
    )


class OuterLossConfig(Section):
    kind: Literal["soft_error", "one_minus_p", "cross_entropy"] = "soft_error"
    sharpness: Positive = Field(default=4.0, description="of the scale-free soft error")
    every: Count = Field(default=25, description="inner steps between the checkpoints where it is read")
    running_sum: NonNegative = Field(
        default=0.0, description="weight of equation (8)'s running sum of the adaptive loss"
    )
    information: NonNegative = Field(
        default=0.0, description="weight of equation (3)'s objective I(Yhat; Y) - beta E[l] - gamma Var[grad l]"
    )
    beta: NonNegative = Field(default=1.0, description="of equation (3): weight of the mean cross-entropy")
    gamma: NonNegative = Field(
        default=0.0, description="of equation (3): weight of the variance of the last layer's gradients"
    )
    entropy: Annotated[FiniteFloat, Field(strict=True)] = Field(
        default=0.0, description="of equation (2): weight of alpha's mean entropy in nats; below 0 rewards mixing"
    )
    total_variation: NonNegative = Field(
        default=0.0, description="of equation (2): weight of alpha's total variation over the run's refreshes"
    )
    stability: NonNegative = Field(
        default=0.0, description="weight of the rises of the cross-entropy from checkpoint to checkpoint, summed"
    )


class MetaLearnerConfig(Section):
    outer_steps: Count = 100
    groups_per_step: Count = Field(default=2, description="units of work summed in one outer step")
    learning_rate: Positive = 0.03
    beta1: Decay = 0.9
    beta2: Decay = 0.98
    clip: Positive = Field(default=0.05, description="largest norm of the summed meta-gradient")
    final_learning_rate: Share = Field(default=0.05, description="linear decay ends at this share of learning_rate")
    weight_decay: NonNegative = 0.0
    outlier_factor: Positive = Field(
        default=20.0, description="a contribution is refused when its norm exceeds this multiple of the recent median"
    )


class DistributedConfig(Section):
    """``workers: 0`` runs the same code in process, ``workers: auto`` has as many as the cluster has room for and units
    need, and follows it as nodes join and leave. Results do not depend on the number of workers."""

    workers: Annotated[int, Field(strict=True, ge=0)] | Literal["auto"] = 2
    address: str | None = Field(default=None, description="none: a private Ray on this machine; auto; HOST:PORT")
    mode: Literal["sync", "async"] = "sync"
    max_staleness: Annotated[int, Field(strict=True, ge=0)] = Field(
        default=2, description="async: outer steps a gradient may lag"
    )
    threads: Count = Field(default=1, description="torch threads per worker; part of the result, unlike workers")
    memory_per_worker: Positive = Field(
        default=4.0,
        description="GB that a unit may take; larger ones are done in parts; part of the result, unlike workers",
    )
    gpus_per_worker: NonNegative | None = Field(default=None, description="none: one where the cluster has GPUs")
    unit_timeout: Positive = Field(default=300.0, description="seconds after which a unit is taken for stalled")
    max_attempts: Count = Field(default=5, description="times a unit is issued before the run gives up")


class Condition(Section):
    """What a dataset is put through. Each field left out leaves the data as it is."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    noise_kind: NoiseKind = "uniform"
    noise_rate: Share = 0.0
    imbalance: Annotated[FiniteFloat, Field(strict=True, ge=1)] = Field(
        default=1.0, description="largest : smallest class frequency in training; 1: as the data is"
    )
    target_prior: Literal["train", "uniform"] = Field(
        default="train", description="class frequencies of the test rows: those of training, or balanced"
    )
    train_size: Count | None = Field(
        default=None, description="most training rows; none: all that the dataset and the imbalance allow"
    )


class EvaluationConfig(Section):
    """Held-out comparison at the end, and the selection score along the way."""

    methods: tuple[str, ...] | None = Field(
        default=None, description="none: the usual ones; see palf_dist.evaluation.methods"
    )
    noise_rates: tuple[Share, ...] = Field(default=(0.0, 0.15, 0.3, 0.5), min_length=1)
    conditions: tuple[Literal["balanced", "matched", "shifted"], ...] = Field(
        default=("balanced", "matched", "shifted"),
        min_length=1,
        description="balanced: as the data is; matched: training and test imbalanced; shifted: training alone",
    )
    suite_conditions: tuple[Condition, ...] = Field(
        default=(), description="those of a suite, in the place of noise_rates and conditions; see docs/suites.md"
    )
    imbalance: Annotated[FiniteFloat, Field(strict=True, gt=1)] = Field(
        default=10.0, description="largest : smallest class frequency of matched and shifted tasks"
    )
    seeds: Count = Field(default=2, description="tasks of each dataset, noise rate and condition")
    select_every: Count = Field(
        default=20, description="outer steps between two selection scores; all windows of an inner run are one"
    )
    select_tasks: Count = Field(default=48, description="fresh tasks of the training datasets for the selection score")

    _no_twins = field_validator("noise_rates", "conditions", "suite_conditions")(distinct)


class CheckpointConfig(Section):
    every: Count = Field(default=5, description="outer steps between two checkpoints")
    keep: Count = 3


class TrackingConfig(Section):
    uri: str | None = Field(default=None, description="none: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db")
    experiment: str = "palf_dist"
    enabled: Annotated[bool, Field(strict=True)] = True


class RunConfig(Section):
    """One meta-training run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "run"
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    data: DataConfig
    tasks: TasksConfig = TasksConfig()
    inner: InnerConfig = InnerConfig()
    policy: PolicyConfig = PolicyConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    outer_loss: OuterLossConfig = OuterLossConfig()
    meta_learner: MetaLearnerConfig = MetaLearnerConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
