"""The control of the benchmark: a small network on noisy labels with a fixed budget of steps. Its trainings stop long
before the minimum and differ from one another at equal weights, so none of the guarantees holds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from palf_dist.learnloss.records import Choose, Outcome, Refine
from palf_dist.learnloss.softmax import SMOOTHING, LabelledRows
from palf_dist.learnloss.space import WeightSpace
from palf_dist.randomness import random_generator

HIDDEN, STEPS, BATCH, RATE = 32, 150, 50, 1e-2
EVERY = 5  # steps between two snapshots
LAST_CHOICE = 100  # on the fly: no new weights after this step


class NoisyMLP:
    """One hidden layer, STEPS steps of Adam whose rate falls to zero.

    Loss lambda . phi with the reference ``ce`` and l1 and l2 of the weights (l2_a of the first layer, l2_b of the
    second), label_smoothing and logit_penalty as in SoftmaxRegression.

    Every training draws its own start and minibatches from (seed, number of the training), so that every method meets
    the same noise in the same order.
    """

    def __init__(
        self, train: LabelledRows, validation: LabelledRows, classes: int, space: WeightSpace, seed: int
    ) -> None:
        assert space.names == ("l1", "l2_a", "l2_b", "label_smoothing", "logit_penalty")
        self.space, self.seed, self.classes, self.trainings = space, seed, classes, 0
        self._inputs, self._labels = torch.tensor(train.inputs).float(), torch.tensor(train.labels)
        self._validation = torch.tensor(validation.inputs).float(), torch.tensor(validation.labels)

    def train(self, weights: np.ndarray) -> Outcome:
        return self._run(weights, None)[1]

    def train_on_the_fly(self, choose: Choose, refine: Refine | None = None) -> tuple[np.ndarray, Outcome]:
        """A fixed budget of steps: nothing to settle down to, so that ``refine`` is never asked."""
        return self._run(self.space.weights(self.space.centre), choose)

    def _run(self, weights: np.ndarray, choose: Choose | None) -> tuple[np.ndarray, Outcome]:
        generator = random_generator("noisy mlp", self.seed, self.trainings)
        self.trainings += 1
        sizes = (self._inputs.shape[1], HIDDEN, self.classes)
        shapes = [(sizes[0], HIDDEN), (HIDDEN,), (HIDDEN, sizes[2]), (sizes[2],)]
        draws = [generator.normal(size=shape) / np.sqrt(shape[0]) * (len(shape) > 1) for shape in shapes]
        parameters = [torch.tensor(draw).float().requires_grad_() for draw in draws]
        optimiser = torch.optim.Adam(parameters, lr=RATE)
        decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, STEPS)
        features, errors = [], []
        for step in range(1, STEPS + 1):
            rows = torch.from_numpy(generator.integers(0, len(self._labels), BATCH))
            factors = torch.tensor([1.0, *weights]).float()
            optimiser.zero_grad()
            (factors @ self._features(parameters, self._inputs[rows], self._labels[rows])).backward()
            optimiser.step()
            decay.step()
            if step % EVERY == 0:
                with torch.no_grad():
                    features.append(self._features(parameters, self._inputs, self._labels).double().numpy())
                    inputs, labels = self._validation
                    errors.append(float(functional.cross_entropy(_logits(parameters, inputs), labels)))
                if choose is not None and step <= LAST_CHOICE:
                    weights = choose(np.array(features), np.array(errors))
        return weights, Outcome(np.array(features), np.array(errors), None, cost=STEPS)

    def _features(self, parameters: list[Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        """phi [6], the reference first."""
        logits = _logits(parameters, inputs)
        first, second = parameters[0], parameters[2]
        absolute = [(torch.sqrt(w**2 + SMOOTHING**2) - SMOOTHING).sum() for w in (first, second)]
        return torch.stack(
            [
                functional.cross_entropy(logits, labels),
                absolute[0] + absolute[1],
                0.5 * (first**2).sum(),
                0.5 * (second**2).sum(),
                -functional.log_softmax(logits, 1).mean(),
                0.5 * (logits**2).sum(1).mean(),
            ]
        )


def _logits(parameters: list[Tensor], inputs: Tensor) -> Tensor:
    first, first_bias, second, second_bias = parameters
    return torch.relu(inputs @ first + first_bias) @ second + second_bias
