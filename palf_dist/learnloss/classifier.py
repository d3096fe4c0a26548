"""TuneLossClassifier: softmax regression for scikit-learn users whose penalties are tuned by TuneLoss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import check_cv
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from palf_dist.errors import ConfigError, SearchError
from palf_dist.learnloss.k_fold import KFoldProblem, deal_folds, hold_out
from palf_dist.learnloss.softmax import LabelledRows, SoftmaxRegression
from palf_dist.learnloss.tuning import TuneLoss, tune_loss
from palf_dist.randomness import random_generator

RANGES = {"l1": (1e-6, 0.1), "l2": (1e-5, 10.0), "label_smoothing": (1e-4, 1.0), "logit_penalty": (1e-5, 1.0)}
"""Where each weight is looked for, unless told otherwise. Standardised inputs give them their meaning."""

Split = tuple[np.ndarray, np.ndarray]
"""Row numbers of the training and of the validation part."""


class TuneLossClassifier(ClassifierMixin, BaseEstimator):
    """Softmax regression whose elastic-net, group-L2, label-smoothing and logit-penalty weights are tuned by TuneLoss.

    Minimises the mean of cross-entropy plus weight . penalty, see SoftmaxRegression for the penalties. Inputs are
    standardised for it, and ``coef_`` and ``intercept_`` are those of the inputs as given. The weights with the least
    mean cross-entropy on the validation rows win, and the model is then trained with them on all rows.

    Args:
        cv: where the validation rows come from. An int: that many stratified folds. A float up to 0.5: the share of
            each class that is held out once. Else a splitter of scikit-learn, or an iterable of (train, validation) row
            numbers.
        trainings: how many weights are tried, each on every fold.
        groups: columns that share an L2 weight of their own: one id per column, or ``{name: columns}`` with column
            numbers, a mask or names of columns; the weight is then called ``l2_<id>``. None: one weight ``l2`` for all.
            Columns in no group are not penalised.
        weights: which of ``l1``, ``l2`` (that of every group), ``l2_<id>``, ``label_smoothing``, ``logit_penalty`` to
            tune: names, or ``{name: (low, high)}`` with 0 < low < high. None: all, in the ranges RANGES.
        max_iter: of L-BFGS, for each training.
        random_state: of the splits and of the search.

    Attributes:
        classes_: [C] the labels.
        coef_: [C, n_features], for two classes [1, n_features].
        intercept_: [C] or [1].
        best_weights_: name -> weight.
        validation_error_: cross-entropy in nats that these weights had, mean over the folds: they were chosen by it, so
            it is optimistic.
        trainings_: one dict per training: kind, weights, validation_error, predicted_error, gradient_evaluations.
        report_: TuneReport of the search.
        n_iter_: gradient evaluations of the last training, on all rows.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
    """

    def __init__(
        self,
        cv: int | float | Any = 5,
        *,
        trainings: int = 10,
        groups: Sequence[Any] | Mapping[str, Any] | None = None,
        weights: Iterable[str] | Mapping[str, tuple[float, float]] | None = None,
        max_iter: int = 250,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.cv = cv
        self.trainings = trainings
        self.groups = groups
        self.weights = weights
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Tune the weights and train with the best on all rows.

        Args:
            X: [n, n_features] finite numbers, dense.
            y: [n] labels of two classes or more.

        Raises:
            ConfigError: a parameter of the estimator is wrong.
            ValueError: X or y is.
            SearchError: no training came to a finite validation error.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        for name in ("trainings", "max_iter"):
            _check_count(name, getattr(self, name), least=1)
        masks = self._masks(X.shape[1])
        ranges = _ranges(self.weights, tuple(masks))
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class only, {self.classes_[0]!r}: a classifier needs two or more")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        scaler = StandardScaler().fit(X)
        # The last row of the coefficients is the intercept: in no group, hence not penalised.
        rows = LabelledRows(np.column_stack([scaler.transform(X), np.ones(len(X))]), labels)
        groups = {name: np.append(mask, False) for name, mask in masks.items()}

        def problem(train: LabelledRows, validation: LabelledRows) -> SoftmaxRegression:
            return SoftmaxRegression(
                train, validation, len(self.classes_), groups, ranges, max_iterations=self.max_iter
            )

        folds = [problem(_take(rows, train), _take(rows, held)) for train, held in self._splits(X, labels, seed)]
        search = tune_loss(KFoldProblem(folds), self.trainings, seed=seed)
        best = self._keep(search)
        last = problem(rows, rows).train(best)
        assert last.models is not None
        self._set_coefficients(last.models[-1], scaler)
        self.n_iter_ = last.cost
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits [n, C]; for two classes [n], those of the second less those of the first."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        logits = X @ self.coef_.T + self.intercept_
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [n, C] in the order of ``classes_``."""
        logits = self.decision_function(X)
        return np.column_stack([expit(-logits), expit(logits)]) if logits.ndim == 1 else softmax(logits, axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest label of each row [n]."""
        logits = self.decision_function(X)
        return self.classes_[(logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(1)]

    def _masks(self, features: int) -> dict[str, np.ndarray]:
        """The columns of each L2 weight: name -> bool [n_features]."""
        if self.groups is None:
            return {"l2": np.ones(features, bool)}
        if not isinstance(self.groups, Mapping):
            ids = np.asarray(self.groups)
            if ids.shape != (features,):
                raise ConfigError(f"groups: shape {ids.shape}, but X has {features} columns; give one id per column")
            return {f"l2_{group}": ids == group for group in np.unique(ids)}
        masks = {f"l2_{name}": self._mask(name, columns, features) for name, columns in self.groups.items()}
        shared = np.flatnonzero(sum(masks.values(), np.zeros(features, int)) > 1)
        if len(shared):
            raise ConfigError(f"groups: column {shared[0]} is in two groups; a column has one L2 weight")
        return masks

    def _mask(self, name: str, columns: Any, features: int) -> np.ndarray:
        wanted = np.asarray(columns)
        if wanted.dtype.kind in "UO":
            wanted = np.flatnonzero(np.isin(getattr(self, "feature_names_in_", []), wanted))
            if len(wanted) < len(columns):
                raise ConfigError(f"groups[{name!r}]: {columns} are not all names of columns of X")
        mask = np.zeros(features, bool)
        try:
            mask[wanted] = True
        except IndexError as error:
            raise ConfigError(f"groups[{name!r}]: no columns of X with {features} columns ({error})") from None
        return mask

    def _splits(self, X: np.ndarray, labels: np.ndarray, seed: int) -> list[Split]:
        """Of each fold. It does not validate rows of a class that it has no training rows of: no weights could help."""
        generator = random_generator("tune loss classifier", seed)
        everything = np.arange(len(labels))
        if isinstance(self.cv, Integral) and not isinstance(self.cv, bool):
            _check_count("cv", self.cv, least=2)
            dealt = deal_folds(labels, int(self.cv), generator)
            splits = [(everything[dealt != fold], everything[dealt == fold]) for fold in range(self.cv)]
        elif isinstance(self.cv, Real):
            share = float(self.cv)
            if not 0 < share <= 0.5:
                raise ConfigError(f"cv: {self.cv!r} is no number of folds; as a share to hold out it is in (0, 0.5]")
            held_out = hold_out(labels, share, generator)
            splits = [(everything[~held_out], everything[held_out])]
        else:
            splits = [(everything[train], everything[held]) for train, held in _given(self.cv, X, labels)]
        known = [(train, held[np.isin(labels[held], labels[train])]) for train, held in splits]
        usable = [(train, held) for train, held in known if len(held)]
        if not usable:
            raise ValueError(f"no class has rows to train with and to validate with: {len(labels)} rows are too few")
        return usable

    def _keep(self, search: TuneLoss) -> np.ndarray:
        """Set what the search came to; the best weights [k]."""
        best, named = search.best, search.space.named
        if best is None:
            raise SearchError("no training came to a finite validation error: X spans too many orders of magnitude")
        self.best_weights_, self.validation_error_ = named(best.weights), best.error
        self.report_ = search.report()
        self.trainings_ = [
            {
                "kind": training.kind,
                "weights": named(training.weights),
                "validation_error": training.error,
                "predicted_error": training.predicted,
                "gradient_evaluations": training.cost,
            }
            for training in search.trainings
        ]
        return best.weights

    def _set_coefficients(self, coefficients: np.ndarray, scaler: StandardScaler) -> None:
        """From those of standardised inputs and the intercept, [n_features + 1, C]."""
        if len(self.classes_) == 2:
            coefficients = coefficients[:, 1:] - coefficients[:, :1]
        self.coef_ = (coefficients[:-1] / scaler.scale_[:, None]).T
        self.intercept_ = coefficients[-1] - self.coef_ @ scaler.mean_


def _take(rows: LabelledRows, which: np.ndarray) -> LabelledRows:
    return LabelledRows(rows.inputs[which], rows.labels[which])


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: {value!r} is no whole number of at least {least}")


def _given(cv: Any, X: np.ndarray, labels: np.ndarray) -> Iterable[Split]:
    try:
        return check_cv(cv, labels, classifier=True).split(X, labels)
    except ValueError as error:
        raise ConfigError(f"cv: {error}") from None


def _ranges(weights: Any, l2: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Of each weight to tune; ``l2`` are the names of the groups' weights."""
    wanted = dict(RANGES) if weights is None else weights
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise ConfigError(f"weights: {weights!r} is neither names nor a mapping of names to (low, high)")
    known = {"l1": RANGES["l1"], **dict.fromkeys(l2, RANGES["l2"]), **RANGES}
    ranges: dict[str, tuple[float, float]] = {}
    for name in wanted:
        if name not in known:
            raise ConfigError(f"weights: {name!r} is unknown; there are {', '.join(known)}")
        found = wanted[name] if isinstance(wanted, Mapping) else known[name]
        if np.shape(found) != (2,):
            raise ConfigError(f"weights[{name!r}]: {found!r} is no pair (low, high)")
        ranges.update(dict.fromkeys(l2 if name == "l2" else (name,), found))
    return ranges
