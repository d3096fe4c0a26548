"""Every built-in architecture: the hand-derived passes against autograd and differences, and what padding may do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from palf_dist.architecture_config import ConvConfig, MLPConfig, ResNetConfig, TransformerConfig
from palf_dist.errors import ConfigError
from palf_dist.inner_models import InputShape, build_model
from palf_dist.randomness import random_generator
from tests.inner_models.helpers import (
    Case,
    arguments,
    assert_derivatives_match_autograd,
    assert_derivatives_match_differences,
    close,
    views,
)

CASES = {
    "mlp": Case(MLPConfig(hidden=(6,)), InputShape(numeric=5)),
    "mlp, two layers, wide": Case(MLPConfig(hidden=(20, 17)), InputShape(numeric=5), classes=18),
    "mlp, columns": Case(MLPConfig(hidden=(6, 4), embedding=3), InputShape(numeric=2, categorical=2, categories=5)),
    "mlp, only categorical": Case(MLPConfig(hidden=(6,)), InputShape(categorical=3, categories=7)),
    "conv, grey": Case(ConvConfig(channels=(4, 8), groups=2), InputShape(image=(8, 8, 1))),
    "conv, colour, odd": Case(ConvConfig(channels=(8, 4, 20), groups=4), InputShape(image=(9, 7, 3))),
    "resnet, grey": Case(ResNetConfig(widths=(4, 8), groups=2), InputShape(image=(8, 8, 1))),
    "resnet, colour, odd": Case(
        ResNetConfig(widths=(4, 4, 20), blocks=(2, 1, 2), groups=4), InputShape(image=(7, 5, 3))
    ),
    "transformer": Case(TransformerConfig(width=6, heads=2, feedforward=9), InputShape(tokens=6, vocabulary=11)),
    "transformer, deep, wide": Case(
        TransformerConfig(width=16, heads=4, feedforward=20, layers=3), InputShape(tokens=5, vocabulary=8)
    ),
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("features", [True, False])
def test_derivatives_match_autograd(case: Case, tasks: int, features: bool) -> None:
    assert_derivatives_match_autograd(case.model(), case.inputs(tasks, 4), features)


def test_derivatives_match_finite_differences(case: Case) -> None:
    assert_derivatives_match_differences(case.model(), case.inputs(2, 4))


def test_one_cotangent_tangent_may_be_missing(case: Case) -> None:
    model, inputs = case.model(), case.inputs(2, 3)
    a = arguments(model, inputs)
    _, _, tape = model.forward(a.theta, inputs)
    _, _, tangent_tape = model.tangent(a.theta, tape, a.v)
    given = (a.theta, tape, tangent_tape, a.v, a.dlogits, a.dfeatures, a.dlogits_tangent)
    assert close(model.backward_tangent(*given, None), model.backward_tangent(*given, torch.zeros_like(a.dfeatures)))


def test_tasks_do_not_interact(case: Case) -> None:
    model, inputs = case.model(), case.inputs(3, 4)
    a = arguments(model, inputs)
    logits, features, tape = model.forward(a.theta, inputs)
    gradient = model.backward(a.theta, tape, a.dlogits, a.dfeatures)
    _, _, tangent_tape = model.tangent(a.theta, tape, a.v)
    cotangents = (a.dlogits, a.dfeatures, a.dlogits_tangent, a.dfeatures_tangent)
    gradient_dot = model.backward_tangent(a.theta, tape, tangent_tape, a.v, *cotangents)
    for g in range(3):
        one = slice(g, g + 1)
        theta, v = a.theta[one], a.v[one]
        own_logits, own_features, own_tape = model.forward(theta, tuple(column[one] for column in inputs))
        _, _, own_tangent_tape = model.tangent(theta, own_tape, v)
        own = [cotangent[one] for cotangent in cotangents]
        assert close(own_logits, logits[one], 1e-13) and close(own_features, features[one], 1e-13)
        assert close(model.backward(theta, own_tape, own[0], own[1]), gradient[one], 1e-13)
        assert close(model.backward_tangent(theta, own_tape, own_tangent_tape, v, *own), gradient_dot[one], 1e-13)


def test_dtype_of_theta_is_the_dtype_of_results(case: Case) -> None:
    model, inputs = case.model(), case.inputs(2, 3)
    a = arguments(model, inputs)
    for dtype in (torch.float32, torch.float64):
        theta, v = a.theta.to(dtype), a.v.to(dtype)
        logits, features, tape = model.forward(theta, inputs)
        gradient = model.backward(theta, tape, torch.ones_like(logits), torch.ones_like(features))
        logits_dot, features_dot, _ = model.tangent(theta, tape, v)
        assert {t.dtype for t in (logits, features, gradient, logits_dot, features_dot)} == {dtype}


def test_float32_agrees_with_float64(case: Case) -> None:
    model, inputs = case.model(), case.inputs(2, 4)
    a = arguments(model, inputs)
    results = []
    for dtype in (torch.float32, torch.float64):
        theta, v, *cotangents = (
            t.to(dtype) for t in (a.theta, a.v, a.dlogits, a.dfeatures, a.dlogits_tangent, a.dfeatures_tangent)
        )
        _, _, tape = model.forward(theta, inputs)
        _, _, tangent_tape = model.tangent(theta, tape, v)
        results.append(model.backward_tangent(theta, tape, tangent_tape, v, *cotangents).double())
    assert close(results[0], results[1], 1e-4)


def test_passes_change_no_argument(case: Case) -> None:
    model, inputs = case.model(), case.inputs(2, 3)
    a = arguments(model, inputs)
    given = [*inputs, *vars(a).values()]
    before = [tensor.clone() for tensor in given]
    _, _, tape = model.forward(a.theta, inputs)
    first = model.backward(a.theta, tape, a.dlogits, a.dfeatures)
    _, _, tangent_tape = model.tangent(a.theta, tape, a.v)
    cotangents = (a.dlogits, a.dfeatures, a.dlogits_tangent, a.dfeatures_tangent)
    once = model.backward_tangent(a.theta, tape, tangent_tape, a.v, *cotangents)
    assert torch.equal(once, model.backward_tangent(a.theta, tape, tangent_tape, a.v, *cotangents))
    assert torch.equal(first, model.backward(a.theta, tape, a.dlogits, a.dfeatures)), "a tape can be used again"
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


def test_passes_leave_no_graph(case: Case) -> None:
    model, inputs = case.model(), case.inputs(1, 3)
    theta = arguments(model, inputs).theta.requires_grad_()
    logits, features, tape = model.forward(theta, inputs)
    gradient = model.backward(theta, tape, torch.ones_like(logits), torch.ones_like(features))
    assert not (logits.requires_grad or features.requires_grad or gradient.requires_grad)


def test_sizes_are_as_announced(case: Case) -> None:
    model, inputs = case.model(), case.inputs(2, 3)
    theta = model.init([random_generator(g) for g in range(2)])
    logits, features = model.apply(theta, inputs)
    assert theta.shape == (2, model.num_parameters) and theta.dtype == torch.float32
    assert logits.shape == (2, 3, case.classes) and features.shape == (2, 3, model.feature_size)
    assert torch.isfinite(logits).all() and logits.std() > 0.01


def test_init_depends_on_each_tasks_generator_alone(case: Case) -> None:
    model = case.model()
    group = model.init([random_generator("task", g) for g in (5, 7, 8)])
    assert torch.equal(group, model.init([random_generator("task", g) for g in (5, 7, 8)]))
    assert torch.equal(group[1:2], model.init([random_generator("task", 7)]))
    assert not torch.equal(group[0], group[1])


def test_number_of_parameters() -> None:
    assert CASES["mlp"].model().num_parameters == 6 * 5 + 6 + 3 * 6 + 3
    assert CASES["mlp, columns"].model().num_parameters == 5 * 3 + 6 * 8 + 6 + 4 * 6 + 4 + 3 * 4 + 3
    assert CASES["conv, grey"].model().num_parameters == 4 * 9 + 4 + 8 + 8 * 36 + 8 + 16 + 3 * 8 + 3
    stem, first, second = 4 * 9 + 8, 2 * (4 * 36 + 8), (8 * 36 + 16) + (8 * 72 + 16) + (8 * 4 + 16)
    assert CASES["resnet, grey"].model().num_parameters == stem + first + second + 3 * 8 + 3
    block = 2 * 12 + (18 * 6 + 18) + (6 * 6 + 6) + (9 * 6 + 9) + (6 * 9 + 6)
    assert CASES["transformer"].model().num_parameters == 11 * 6 + 6 * 6 + block + 3 * 6 + 3


def test_flat_layout_is_stem_body_head_row_major() -> None:
    model = CASES["mlp"].model()
    theta = model.init([random_generator(1)]).double()
    weight, bias, head, head_bias = theta[0].split([30, 6, 18, 3])
    inputs = CASES["mlp"].inputs(1, 4)
    features = torch.relu(inputs[0][0].double() @ weight.view(6, 5).T + bias)
    logits, actual, _ = model.forward(theta, inputs)
    assert close(actual[0], features) and close(logits[0], features @ head.view(3, 6).T + head_bias)


def test_conv_is_torch_convolution_and_group_norm() -> None:
    case = Case(ConvConfig(channels=(4,), groups=2), InputShape(image=(7, 6, 3)))
    model, (images,) = case.model(), case.inputs(1, 2)
    theta = arguments(model, (images,)).theta
    weight, bias, gamma, beta, *_ = views(model, theta)
    kernel = weight[0].view(4, 3, 3, 3).permute(0, 3, 1, 2)
    x = torch.conv2d(images[0].double().permute(0, 3, 1, 2), kernel, bias[0], stride=2, padding=1)
    expected = torch.relu(torch.nn.functional.group_norm(x, 2, gamma[0], beta[0])).mean((2, 3))
    assert close(model.forward(theta, (images,))[1][0], expected)


class TorchBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(groups, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(groups, outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.GroupNorm(groups, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def torch_resnet(architecture: ResNetConfig, channels: int, classes: int) -> nn.Sequential:
    """The same net of torch's own layers, its parameters in the same order."""
    width, groups = architecture.widths[0], architecture.groups
    layers = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width), nn.ReLU()]
    for stage, (outputs, blocks) in enumerate(zip(architecture.widths, architecture.blocks, strict=True)):
        for block in range(blocks):
            layers.append(TorchBlock(width, outputs, groups, stride=2 if stage and not block else 1))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)).double()


@pytest.mark.parametrize("name", ["resnet, grey", "resnet, colour, odd"])
def test_resnet_is_of_torchs_layers(name: str) -> None:
    """Logits, gradient and Hessian-vector product of sum of (logits weighed at random) squared."""
    case = CASES[name]
    assert isinstance(case.architecture, ResNetConfig) and case.shape.image is not None
    model, (images,) = case.model(), case.inputs(1, 3)
    a = arguments(model, (images,))
    net = torch_resnet(case.architecture, case.shape.image[2], case.classes)
    parameters = dict(net.named_parameters())

    def by_name(flat: torch.Tensor) -> dict[str, torch.Tensor]:
        ours = zip(parameters.items(), views(model, flat), strict=True)
        return {name: as_torch(part[0], like) for (name, like), part in ours}

    def as_torch(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if like.dim() != 4:
            return part
        outputs, inputs, side, _ = like.shape
        return part.view(outputs, side, side, inputs).permute(0, 3, 1, 2)

    def of_torch(theta: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, by_name(theta), images[0].double().permute(0, 3, 1, 2))

    logits, _, tape = model.forward(a.theta, (images,))
    assert close(logits[0], of_torch(a.theta).detach())

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return (a.dlogits[0] * of_torch(theta)).square().sum()

    weights = 2 * a.dlogits.square()
    _, expected = torch.autograd.functional.vhp(loss, a.theta, a.v)
    assert close(model.backward(a.theta, tape, weights * logits, None), torch.func.grad(loss)(a.theta))
    logits_dot, _, tangent_tape = model.tangent(a.theta, tape, a.v)
    given = weights * logits, None, weights * logits_dot, None
    assert close(model.backward_tangent(a.theta, tape, tangent_tape, a.v, *given), expected)


@pytest.mark.parametrize("layers", [1, 6])
def test_transformer_blocks_are_torchs(layers: int) -> None:
    architecture = TransformerConfig(width=8, heads=2, feedforward=12, layers=layers)
    case = Case(architecture, InputShape(tokens=5, vocabulary=9))
    model, (tokens,) = case.model(), case.inputs(1, 3)
    tokens = tokens[:, :2]  # torch has no answer for a text of padding alone
    theta = arguments(model, (tokens,)).theta
    names = ["norm1", "self_attn.in_proj", "self_attn.out_proj", "norm2", "linear1", "linear2"]
    words, positions, *inner = (p[0] for p in views(model, theta)[:-2])
    real = (tokens[0] != 0)[..., None].double()
    x = words[tokens[0]] * real + positions
    for layer in range(layers):
        block = torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0, norm_first=True, batch_first=True).double()
        state: dict[str, torch.Tensor] = {}
        for index, name in enumerate(names, start=layer * len(names)):
            joint = "_" if name.endswith("in_proj") else "."
            state |= {f"{name}{joint}weight": inner[2 * index], f"{name}{joint}bias": inner[2 * index + 1]}
        block.load_state_dict(state)
        x = block(x, src_key_padding_mask=tokens[0] == 0)
    assert close(model.forward(theta, (tokens,))[1][0], ((x * real).sum(1) / real.sum(1)).detach())


def test_padding_columns_and_classes_change_no_draw_and_no_result() -> None:
    narrow = build_model(MLPConfig(hidden=(6,)), InputShape(numeric=3, categorical=1, categories=4), 2)
    wide = build_model(MLPConfig(hidden=(6,)), InputShape(numeric=5, categorical=2, categories=9), 4)
    table, weight, _, head, _ = views(narrow, narrow.init([random_generator("t")]))
    padded = views(wide, wide.init([random_generator("t")]))
    real_columns = [0, 1, 2, 3, 8, 9, 10]  # one embedding of width 4, three numeric columns
    assert torch.equal(padded[0][:, :4], table)
    torch.testing.assert_close(padded[1][:, :, real_columns] * np.sqrt(13 / 7), weight)  # the scale is the width's
    assert torch.equal(padded[3][:, :2], head)

    theta = arguments(wide, (torch.zeros(1, 1, 5), torch.zeros(1, 1, 2, dtype=torch.long))).theta
    parts = views(wide, theta)
    cut = (parts[0][:, :4], parts[1][:, :, real_columns], parts[2], parts[3][:, :2], parts[4][:, :2])
    own = torch.cat([part.flatten(1) for part in cut], 1)
    numeric, codes = torch.randn(1, 4, 3), torch.randint(0, 4, (1, 4, 1))
    padded_inputs = (torch.nn.functional.pad(numeric, (0, 2)), torch.nn.functional.pad(codes, (0, 1)))
    assert close(wide.forward(theta, padded_inputs)[0][..., :2], narrow.forward(own, (numeric, codes))[0])


def test_padding_channels_change_no_draw() -> None:
    grey, colour = (
        views(model, model.init([random_generator(3)]))
        for model in (build_model(ConvConfig(), InputShape(image=(8, 8, channels)), 2) for channels in (1, 3))
    )
    torch.testing.assert_close(colour[0][:, :, ::3] * np.sqrt(3), grey[0])
    assert all(torch.equal(one, three) for one, three in zip(grey[1:], colour[1:], strict=True))


def test_code_zero_and_padding_tokens_have_no_gradient() -> None:
    for name in ("mlp, columns", "transformer"):
        model, inputs = CASES[name].model(), CASES[name].inputs(2, 4)
        a = arguments(model, inputs)
        _, _, tape = model.forward(a.theta, inputs)
        table = views(model, model.backward(a.theta, tape, a.dlogits, a.dfeatures))[0]
        assert (table[:, 0] == 0).all() and (table[:, 1:] != 0).any()


def test_padding_words_change_nothing() -> None:
    long = Case(TransformerConfig(width=8), InputShape(tokens=6, vocabulary=9))
    model = long.model()
    tokens = torch.tensor([[[3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]])
    theta = arguments(model, (tokens,)).theta
    _, features, _ = model.forward(theta, (tokens,))
    words, positions, *inner = views(model, theta)
    short = build_model(long.architecture, InputShape(tokens=2, vocabulary=9), long.classes)
    cut = torch.cat([words.flatten(1), positions[:, :2].flatten(1), *(part.flatten(1) for part in inner)], 1)
    _, expected, _ = short.forward(cut, (tokens[..., :2],))
    assert close(features, expected)
    assert (features[:, 1] == 0).all(), "a text of padding alone has the features 0"


@settings(max_examples=25)
@given(
    hidden=st.lists(st.integers(1, 18), min_size=1, max_size=3),
    numeric=st.integers(0, 4),
    categorical=st.integers(0, 3),
    tasks=st.integers(1, 3),
    rows=st.integers(1, 5),
    classes=st.integers(2, 17),
)
def test_mlp_of_any_size(
    hidden: list[int], numeric: int, categorical: int, tasks: int, rows: int, classes: int
) -> None:
    shape = InputShape(numeric=max(numeric, 1 - categorical), categorical=categorical, categories=4)
    case = Case(MLPConfig(hidden=tuple(hidden), embedding=2), shape, classes)
    assert_derivatives_match_autograd(case.model(), case.inputs(tasks, rows))


@settings(max_examples=15)
@given(
    channels=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    groups=st.integers(1, 2),
    image=st.tuples(st.integers(5, 9), st.integers(5, 9), st.integers(1, 4)),
    tasks=st.integers(1, 2),
    rows=st.integers(1, 3),
)
def test_conv_of_any_size(channels: list[int], groups: int, image: tuple[int, int, int], tasks: int, rows: int) -> None:
    architecture = ConvConfig(channels=tuple(groups * c for c in channels), groups=groups)
    case = Case(architecture, InputShape(image=image))
    assert_derivatives_match_autograd(case.model(), case.inputs(tasks, rows))


@settings(max_examples=15)
@given(
    heads=st.integers(1, 3),
    head_width=st.integers(1, 6),
    feedforward=st.integers(1, 18),
    layers=st.integers(1, 2),
    length=st.integers(2, 6),
    rows=st.integers(1, 3),
)
def test_transformer_of_any_size(
    heads: int, head_width: int, feedforward: int, layers: int, length: int, rows: int
) -> None:
    width = heads * head_width + heads * (heads * head_width == 1)  # layer norm of one number is constant
    architecture = TransformerConfig(width=width, heads=heads, feedforward=feedforward, layers=layers)
    case = Case(architecture, InputShape(tokens=length, vocabulary=6))
    inputs = case.inputs(2, rows)
    inputs[0][:, 0, 0] = 1  # not every text is padding alone
    assert_derivatives_match_autograd(case.model(), inputs)


@pytest.mark.parametrize(
    ("architecture", "shape", "named"),
    [
        (MLPConfig(), InputShape(image=(8, 8, 1)), "numeric or categorical"),
        (ConvConfig(), InputShape(numeric=4), "needs images"),
        (TransformerConfig(), InputShape(numeric=4), "needs texts"),
        (ConvConfig(channels=(8, 4), groups=4), InputShape(image=(2, 2, 1)), "after 2 entries"),
        (ResNetConfig(), InputShape(numeric=4), "resnet needs images"),
        (ResNetConfig(widths=(8, 4)), InputShape(image=(2, 2, 1)), r"resnet: after 2 entries of widths \[8, 4\]"),
    ],
)
def test_input_that_an_architecture_cannot_read(architecture: object, shape: InputShape, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build_model(architecture, shape, 2)  # type: ignore[arg-type]
