"""User modules: the same derivatives as any inner model, and a refusal for each kind that would be wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from palf_dist.architecture_config import MLPConfig, ModuleConfig
from palf_dist.errors import ConfigError, UnsupportedModuleError
from palf_dist.inner_models import InputShape, build_model
from palf_dist.inner_models.module import FunctionalModel
from palf_dist.randomness import random_generator
from tests.inner_models.helpers import (
    Case,
    arguments,
    assert_derivatives_match_autograd,
    assert_derivatives_match_differences,
    close,
)

WIDTH = 6


class Network(nn.Module):
    """Linear -> ``middle`` -> Linear, with the features given."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.middle = middle
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.middle(self.first(x))
        return self.last(features), features


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Attention(nn.Module):
    """torch's attention over the features as a sequence of single numbers."""

    def __init__(self, backend: SDPBackend | None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        sequence = x[:, None, :, None]
        if self.backend is None:
            return nn.functional.scaled_dot_product_attention(sequence, sequence, sequence)[:, 0, :, 0]
        with sdpa_kernel(self.backend):
            return nn.functional.scaled_dot_product_attention(sequence, sequence, sequence)[:, 0, :, 0]


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class WrongSecondDerivative(torch.autograd.Function):
    """y = x^3 whose backward forgets that it depends on x."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.slope = 3 * x.detach() ** 2  # type: ignore[attr-defined]
        return x**3

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy * ctx.slope  # type: ignore[attr-defined]


def model_of(build: Callable[[], nn.Module]) -> FunctionalModel:
    return FunctionalModel(build, (torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)),))


def numeric_factory(shape: InputShape, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(shape.numeric, 5), nn.Tanh(), nn.Linear(5, classes))


def image_factory(shape: InputShape, classes: int) -> nn.Module:
    assert shape.image is not None
    height, width, channels = shape.image
    convolution = nn.Conv2d(channels, 4, 3, padding=1)
    return nn.Sequential(
        convolution, nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * height * width, classes)
    )


def wrong_factory(shape: InputShape, classes: int) -> None:
    """A factory that forgets to return."""


def raising_factory(shape: InputShape, classes: int) -> nn.Module:
    return nn.Linear(shape.numeric // 0, classes)


def three_classes_factory(shape: InputShape, classes: int) -> nn.Module:
    return nn.Linear(shape.numeric, 3)


class Texts(nn.Module):
    def __init__(self, shape: InputShape, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.norm(self.words(tokens)).mean(1))


def text_factory(shape: InputShape, classes: int) -> nn.Module:
    return Texts(shape, classes)


def factory_case(reads: str, shape: InputShape, function: str) -> Case:
    return Case(ModuleConfig(factory=f"{__name__}:{function}", reads=reads), shape)  # type: ignore[arg-type]


class WithUnused(Network):
    """A parameter that forward does not read, and one that must stay as it is."""

    def __init__(self) -> None:
        super().__init__(nn.Tanh())
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = super().forward(x)
        return self.frozen * logits, features


FINE: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Network(nn.ReLU()),
    "affine layer norm": lambda: Network(nn.LayerNorm(WIDTH)),
    "batch norm without state": lambda: Network(nn.BatchNorm1d(WIDTH, track_running_stats=False)),
    "batch norm in eval mode": lambda: Network(nn.BatchNorm1d(WIDTH).eval()),
    "dropout in eval mode": lambda: Network(nn.Dropout(0.5).eval()),
    "attention by the math path": lambda: Network(Attention(SDPBackend.MATH)),
    "unused and frozen parameters": WithUnused,
}


@pytest.mark.parametrize("name", FINE)
def test_modules_that_are_right(name: str) -> None:
    model, inputs = model_of(FINE[name]), (torch.randn(2, 5, 4),)
    assert_derivatives_match_autograd(model, inputs)
    assert_derivatives_match_autograd(model, inputs, features=False)
    assert_derivatives_match_differences(model, inputs)


def test_module_that_is_linear_in_its_parameters() -> None:
    model, inputs = model_of(lambda: nn.Linear(4, 3)), (torch.randn(2, 5, 4),)
    assert_derivatives_match_differences(model, inputs)
    logits, features, _ = model.forward(arguments(model, inputs).theta, inputs)
    assert torch.equal(logits, features), "without features of its own, the logits stand for them"
    assert model.feature_size == 3


@pytest.mark.parametrize(
    ("reads", "shape", "function"),
    [
        ("numeric", InputShape(numeric=4), "numeric_factory"),
        ("image", InputShape(image=(4, 5, 3)), "image_factory"),
        ("tokens", InputShape(tokens=5, vocabulary=9), "text_factory"),
    ],
)
def test_factories(reads: str, shape: InputShape, function: str) -> None:
    case = factory_case(reads, shape, function)
    model, inputs = case.model(), case.inputs(2, 3)
    assert_derivatives_match_autograd(model, inputs)
    assert_derivatives_match_differences(model, inputs)


def test_same_results_as_the_built_in_model() -> None:
    case = Case(MLPConfig(hidden=(WIDTH,)), InputShape(numeric=4))
    built_in, module = case.model(), model_of(lambda: Network(nn.ReLU()))
    assert built_in.num_parameters == module.num_parameters
    inputs = case.inputs(3, 5)
    a = arguments(module, inputs)  # nn.Linear stores its weight as our Linear does
    results = []
    for model in (built_in, module):
        _, _, tape = model.forward(a.theta, inputs)
        _, _, tangent_tape = model.tangent(a.theta, tape, a.v)
        cotangents = (a.dlogits, a.dfeatures, a.dlogits_tangent, a.dfeatures_tangent)
        results.append(model.backward_tangent(a.theta, tape, tangent_tape, a.v, *cotangents))
    assert close(results[0], results[1])


def test_tasks_do_not_interact() -> None:
    model, inputs = model_of(FINE["batch norm without state"]), (torch.randn(3, 5, 4),)
    theta = arguments(model, inputs).theta
    logits, _ = model.apply(theta, inputs)
    for g in range(3):
        assert close(model.apply(theta[g : g + 1], (inputs[0][g : g + 1],))[0], logits[g : g + 1])


def test_init_depends_on_each_tasks_generator_alone() -> None:
    model = model_of(FINE["relu"])
    state = torch.get_rng_state()
    group = model.init([random_generator("task", g) for g in (5, 7)])
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is left as it was"
    assert torch.equal(group[1:], model.init([random_generator("task", 7)]))
    assert not torch.equal(group[0], group[1]) and group.dtype == torch.float32


def test_frozen_parameters_are_no_part_of_theta() -> None:
    assert model_of(WithUnused).num_parameters == model_of(FINE["relu"]).num_parameters + 2


def shared() -> nn.Module:
    network = Network(nn.Linear(WIDTH, WIDTH))
    network.middle.bias = network.first.bias
    return network


def integer() -> nn.Module:
    network = Network(nn.Tanh())
    network.middle.count = nn.Parameter(torch.tensor(1), requires_grad=False)
    return network


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "batch norm": (lambda: Network(nn.BatchNorm1d(WIDTH)), r"middle\.running_mean", "changes this buffer", "GroupNorm"),
    "dropout": (lambda: Network(nn.Dropout(0.5)), "middle", "random", "remove dropout"),
    "noise": (lambda: Network(Lambda(lambda x: x + torch.randn_like(x))), "middle", "random", "noise"),
    "fused attention": (lambda: Network(Attention(None)), "middle", "fused attention", "MATH"),
    "encoder layer": (
        lambda: Network(nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0)),
        r"middle\.self_attn",
        "fused attention",
        "MATH",
    ),
    "cdist": (
        lambda: Network(Lambda(lambda x: x + torch.cdist(x, x).sum(1, keepdim=True))),
        "middle",
        "cdist",
        "broadcasting",
    ),
    "checkpoint": (lambda: Network(Checkpointed(False)), r"middle\.inner", "checkpoint", "directly"),
    "reentrant checkpoint": (lambda: Network(Checkpointed(True)), r"middle\.inner", "checkpoint", "directly"),
    "shared parameter": (shared, r"middle\.bias", r"same tensor as Network\.first\.bias", "its own parameter"),
    "integer parameter": (integer, r"middle\.count", "int64", "buffer"),
    "lazy parameter": (lambda: Network(nn.LazyLinear(WIDTH)), r"middle\.weight", "lazy", "sizes"),
    "no parameter": (nn.Identity, "Identity", "no parameter", "add one"),
    "detach": (lambda: Network(Lambda(lambda x: x * x.detach())), "Network", "finite differences", "detach"),
    "wrong backward": (lambda: Network(Lambda(WrongSecondDerivative.apply)), "Network", "finite differences", "custom"),
    "root at zero": (
        lambda: Network(Lambda(lambda x: (x * 0).norm(dim=1, keepdim=True).sqrt() + x)),
        "Network",
        "finite differences",
        "roots at zero",
    ),
    "no float64": (
        lambda: Network(Lambda(lambda x: x @ torch.eye(WIDTH, dtype=torch.float32))),
        "Network",
        "float64",
        "dtype",
    ),
    "shape of logits": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)),
        "Sequential",
        "returned",
        "return logits",
    ),
    "does not run": (lambda: nn.Linear(5, 3), "Linear", "cannot be run", "check its input"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:None of the inputs have requires_grad")
def test_refusals_name_module_reason_and_remedy(name: str) -> None:
    build, path, reason, remedy = REFUSED[name]
    with pytest.raises(UnsupportedModuleError, match=rf"^module .*{path}.*{reason}.*{remedy}"):
        model_of(build)


@pytest.mark.parametrize(
    ("factory", "reads", "named"),
    [
        ("no_such_package:make", "numeric", "cannot be imported"),
        (f"{__name__}:no_such_function", "numeric", "cannot be imported"),
        (f"{__name__}:wrong_factory", "numeric", "returned NoneType"),
        (f"{__name__}:raising_factory", "numeric", "raised ZeroDivisionError: .* for InputShape.* and 2 classes"),
        (f"{__name__}:three_classes_factory", "numeric", r"asked for 2 classes, .* logits \[rows, 3\]"),
        (f"{__name__}:numeric_factory", "image", "reads image"),
        (f"{__name__}:numeric_factory", "tokens", "reads tokens"),
    ],
)
def test_factory_that_cannot_be_used(factory: str, reads: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build_model(ModuleConfig(factory=factory, reads=reads), InputShape(numeric=4), 2)  # type: ignore[arg-type]
