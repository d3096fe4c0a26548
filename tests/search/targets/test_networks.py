from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palf_dist.losses import LossContext, reference_losses
from palf_dist.policies.static import control_vector
from palf_dist.search.targets import LossWeightsConfig
from palf_dist.search.targets.config import NETWORK_LOSSES
from palf_dist.search.targets.networks import NetworkTrainer
from palf_dist.search.targets.rows import load_rows
from palf_dist.types import AVERAGED_BASIS, BASIS_LOSSES, CONTROL_INDEX, NUM_BASIS

ALL = (*NETWORK_LOSSES, "weight_decay")


def trainer(tmp_path: Path, **settings: Any) -> NetworkTrainer:
    config = LossWeightsConfig.model_validate(
        {
            "dataset": "digits",
            "cache": str(tmp_path / "cache"),
            "model": {"kind": "mlp", "hidden": [8]},
            "rows": {"train": 50, "validation": 40, "test": 30},
            "weights": {name: [0.1, 10.0] for name in ALL},
            "training": {"steps": 6, "batch_size": 16},
            "snapshots": 2,
            **settings,
        }
    )
    return NetworkTrainer(config, load_rows(config))


def test_features_and_error_are_the_definitions(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    group = made.group
    *_, snapshot = made.train(np.full(len(ALL), 0.5))
    theta = torch.from_numpy(snapshot.model["theta"]).double()
    train, validation = ([column.double() for column in rows.inputs] for rows in (group.train, group.validation))
    train[1], validation[1] = train[1].long(), validation[1].long()
    z, h = group.model.apply(theta, tuple(train))
    context = LossContext.create(group.class_mask, torch.zeros(1, 10).double())
    controls = control_vector({})[None].double()
    sums = torch.zeros(NUM_BASIS).double()
    for start in range(0, 50, 16):
        rows = slice(start, start + 16)
        labels = group.train.labels[:, rows]
        sums += reference_losses(z[:, rows], labels, h[:, rows], controls, context, BASIS_LOSSES).sum((1, 2))
    assert [sums[BASIS_LOSSES.index(name)] for name in AVERAGED_BASIS] == [sums[0]] * 2, "they are ce"
    phi = [*(sums[:-2] / 50).tolist(), float(0.5 * (theta**2).sum())]
    np.testing.assert_allclose(snapshot.features, phi, rtol=2e-4)
    p = torch.softmax(group.model.apply(theta, tuple(validation))[0], -1)[0]
    error = 1 - p[torch.arange(40), group.validation.labels[0]].mean()
    assert snapshot.error == pytest.approx(float(error), rel=1e-4)
    assert snapshot.misclassified == float((p.argmax(1) != group.validation.labels[0]).double().mean())
    assert snapshot.number == 2 and snapshot.last and snapshot.cost == 6


def test_controls_are_the_weights_over_the_sum_of_the_mixture(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    weights = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 0.5, 0.5, 8.0])
    controls = made.controls(weights)
    np.testing.assert_allclose(
        controls[:NUM_BASIS], np.array([1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.5, 0.5, 0.0, 0.0]) / 17, rtol=1e-6
    )
    assert float(controls[CONTROL_INDEX["wd"]]) == pytest.approx(8 / 17)


def test_one_step_of_gradient_descent_is_along_the_loss(tmp_path: Path) -> None:
    """theta1 = theta0 - rate * grad of (ce + w l_focal + d |theta|^2 / 2) / (1 + w) on the first batch."""
    training = {"steps": 1, "batch_size": 16, "optimiser": "sgd", "learning_rate": 0.1}
    made = trainer(tmp_path, training=training, weights={"focal": [0.1, 10], "weight_decay": [0.1, 10]})
    group, (w, decay) = made.group, (2.0, 0.6)
    (snapshot,) = made.train(np.array([w, decay]))
    theta = group.theta0.clone().requires_grad_()
    inputs, labels = group.train.batch(group.batches[0])
    z, h = group.model.apply(theta, inputs)
    context = LossContext.create(group.class_mask, group.log_prior_ratio)
    losses = reference_losses(z, labels, h, control_vector({})[None], context, ("ce", "focal")).mean((1, 2))
    loss = (losses[0] + w * losses[1] + decay * 0.5 * theta.square().sum()) / (1 + w)
    (gradient,) = torch.autograd.grad(loss, theta)
    expected = (group.theta0 - 0.1 * gradient).numpy()
    np.testing.assert_allclose(snapshot.model["theta"], expected, rtol=1e-4, atol=1e-6)


def test_decay_that_is_not_searched_is_left_alone(tmp_path: Path) -> None:
    training = {"steps": 6, "batch_size": 16, "weight_decay": 0.25}
    made = trainer(tmp_path, training=training, weights={"focal": [0.1, 10]})
    assert float(made.controls(np.array([9.0]))[CONTROL_INDEX["wd"]]) == 0.25
