"""configs/paper-gpu.yaml: the paper's inner models are a matter of configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from palf_dist.architecture_config import ResNetConfig, TransformerConfig
from palf_dist.config import RunConfig
from palf_dist.config_loading import load_config
from palf_dist.inner_models import InputShape
from palf_dist.rehearsal import Work, need
from palf_dist.tasks.encoded import WORDS, EncodedDataset
from tests.inner_models.helpers import Case

TORCHVISION = 11_689_512
"""Parameters of torchvision.models.resnet18: 1,000 classes, a first convolution of 7 x 7, batch norm, whose gamma and
beta are as many as group norm's."""

ENCODER = 18_914_304
"""Parameters of torch.nn.TransformerEncoder(TransformerEncoderLayer(512, 8, 2048), 6)."""


@pytest.fixture(name="config", scope="module")
def _config() -> RunConfig:
    return load_config(Path(__file__).parents[2] / "configs" / "paper-gpu.yaml")


@pytest.fixture(name="resnet")
def _resnet(config: RunConfig) -> Case:
    (architecture,) = (one for one in config.tasks.architectures if isinstance(one, ResNetConfig))
    return Case(architecture, InputShape(image=(architecture.image_size, architecture.image_size, 3)), 10)


@pytest.fixture(name="transformer")
def _transformer(config: RunConfig) -> Case:
    (architecture,) = (one for one in config.tasks.architectures if isinstance(one, TransformerConfig))
    return Case(architecture, InputShape(tokens=architecture.length, vocabulary=architecture.vocabulary), 2)


def test_resnet_18_has_as_many_parameters_as_torchvisions(resnet: Case) -> None:
    stem, head = 3 * 64 * (7 * 7 - 3 * 3), (512 + 1) * (1000 - 10)
    assert resnet.model().num_parameters == TORCHVISION - stem - head == 11_173_962


def test_the_encoder_of_six_layers_has_as_many_parameters_as_torchs(transformer: Case) -> None:
    words, positions, head = 16384 * 512, 256 * 512, (512 + 1) * 2
    assert transformer.model().num_parameters == ENCODER + words + positions + head
    with torch.device("meta"):
        layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, norm_first=True)
        layers = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    assert sum(parameter.numel() for parameter in layers.parameters()) == ENCODER


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_they_start_with_sensible_logits_and_gradients(name: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(name)
    model, inputs = case.model(), case.inputs(1, 4)
    theta = model.init([np.random.default_rng(0)])
    logits, _, tape = model.forward(theta, inputs)
    assert 0.1 < logits[0, :-1].std() < 3  # the last text is all padding
    gradient = model.backward(theta, tape, torch.softmax(logits, -1) / 4, None)
    norms = [float(part.norm()) for part in model.parameters(gradient)]
    assert np.isfinite(norms).all() and min(norms[2:-2]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["meta_gradient", "train"])
@pytest.mark.parametrize("family", ["image", "text"])
def test_their_units_fit_the_gpu_that_the_file_names(config: RunConfig, family: str, kind: str) -> None:
    used = {source.name: dataset(source.name, family) for source in config.data.train if source.family == family}
    data = config.data.model_copy(update={"train": tuple(s for s in config.data.train if s.family == family)})
    found = need(config.model_copy(update={"data": data}), used, Work(kind, ["image", "text"].index(family), "adam"))
    limit = 1e9 * config.distributed.memory_per_worker
    assert found.parts(config.tasks.group_size, limit) is not None, f"{found.total(1) / 1e9:.1f} GB for one task"


def dataset(name: str, family: str, rows: int = 20_000) -> EncodedDataset:
    images = np.zeros((rows, 32, 32, 3), np.uint8) if family == "image" else None
    words = np.ones((rows, WORDS), np.uint32) if family == "text" else None
    numeric, categorical = np.zeros((rows, 0), np.float32), np.zeros((rows, 0), np.int32)
    names = tuple(map(str, range(10)))
    return EncodedDataset(name, family, name, names, numeric, categorical, (), images, words, np.arange(rows) % 10)
