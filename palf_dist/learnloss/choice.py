"""Which weights of the winner's cone to train with next: three answers, all free of the scale and sign of the error."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from palf_dist.learnloss.cone import TOLERANCE, Cone
from palf_dist.learnloss.linear_program import minimise
from palf_dist.learnloss.space import WeightSpace

_TAU = 0.5  # how fast observations lose weight with their error, in robust spreads
_LIGHT = 1e-3  # observations of less weight than that do not count,
_ENOUGH = 4  # but at least so many times the number of features do
_RIDGE = 1e-8  # relative to the spread of a feature
_FLAT = 1e-9  # share of the error's spread below which a fit explains nothing
_ALPHA = 0.01  # least slope of the loss in the error: spreads of the reference feature per spread of the error


def margin(cone: Cone, rises: np.ndarray, low: np.ndarray, active: list[int]) -> np.ndarray | None:
    """x [k] of the largest t such that each observation's loss exceeds the winner's by t times its ``rises`` [N] >= 0;
    None where no error is above the winner's. ``active`` are rows to start with."""
    # t is at most norm / rise of any observation: in units of the least of these it is in [0, 1]
    slopes = np.divide(rises, cone.norms, out=np.zeros_like(rises), where=cone.norms > 0)
    if not slopes.any():
        return None
    rows, bounds = cone.rows(slopes / slopes.max())
    box = np.r_[low, 0.0], np.ones(len(low) + 1)
    found = minimise(np.r_[np.zeros(len(low)), -1.0], box, rows, bounds - TOLERANCE, active, TOLERANCE)
    return None if found is None else found.point[:-1]


def slack(cone: Cone, errors: np.ndarray, low: np.ndarray, active: list[int]) -> np.ndarray | None:
    """x [k] of the weighted fit lambda . phi_j >= c + alpha e_j with the least weighted sum of the differences; None
    where the observations that count do not differ. ``active`` are rows of the cone to start with.

    The linear program is over x, alpha and -c, with features relative to the winner's in units of the farthest that
    counts, and errors relative to the least in units of their spread.
    """
    rises = errors - errors.min()
    rises = rises / (float(np.median(rises)) or float(rises.mean()) or 1.0)
    enough = np.sort(rises)[: _ENOUGH * (len(low) + 1)][-1]
    weights = np.exp(-rises / max(_TAU, -enough / np.log(_LIGHT)))
    heavy = weights >= 0.99 * _LIGHT
    shares = weights[heavy]
    shares /= shares.sum()
    rises, differences = rises[heavy], cone.differences[heavy]
    size = float(cone.norms[heavy].max())
    if size == 0 or not rises.any():
        return None
    differences = differences / size
    fit = np.column_stack([differences[:, 1:], -rises, np.ones(len(rises))])
    fit_norms = np.abs(fit).sum(1) + np.abs(differences[:, 0])
    cone_rows, cone_bounds = cone.rows(np.zeros(len(errors)))
    rows = np.vstack([np.column_stack([cone_rows, np.zeros(len(errors))]), fit / fit_norms[:, None]])
    bounds = np.r_[cone_bounds - TOLERANCE, -differences[:, 0] / fit_norms]
    spread = float(np.sqrt(shares @ (differences[:, 0] - shares @ differences[:, 0]) ** 2))
    least = _ALPHA * max(spread, 1e-6)
    # the losses are in [0, 1] here, so that the sum is at least alpha (max - mean of the errors) - 1 at any alpha, and
    # at most 1 + the same at the least one: larger alphas than this cannot be best
    most = least + 2.0 / float(rises.max() - shares @ rises)
    box = np.r_[low, least, -1.0], np.r_[np.ones(len(low)), most, 1.0 + most * rises.max()]
    found = minimise(shares @ fit, box, rows, bounds, active, TOLERANCE)
    return None if found is None else found.point[:-2]


def least_squares(features: np.ndarray, errors: np.ndarray, space: WeightSpace) -> np.ndarray | None:
    """lambda [k] in F of the least-squares fit e = c + b . phi, b = a (1, lambda), a > 0, to features [N, K] and errors
    [N]; None where no loss in F grows with the error.

    The constraints a low_k <= b_k <= a high_k are linear: with R from a QR decomposition, y = R b - Q' e turns the fit
    into the least |y| within a cone, which non-negative least squares answers exactly (Lawson & Hanson 1974, ch. 23).
    """
    count, size = features.shape
    columns, target = features - features.mean(0), errors - errors.mean()
    scale = columns.std(0)
    scale[scale == 0] = 1.0
    # the identity keeps R invertible where features are collinear
    q, r = np.linalg.qr(np.vstack([columns / scale, _RIDGE * np.sqrt(count) * np.eye(size)]))
    r = r * scale
    aim = target @ q[:count] / (np.linalg.norm(target) or 1.0)
    reference, *tuned = np.eye(size)
    cone = np.vstack([tuned - np.outer(space.low, reference), np.outer(space.high, reference) - tuned])
    rows = np.linalg.solve(r.T, cone.T).T
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    dual = np.vstack([rows.T, -(rows @ aim)])
    residual = dual @ nnls(dual, np.eye(size + 1)[-1])[0]
    residual[-1] -= 1.0
    fitted = aim - residual[:-1] / residual[-1]  # R b
    if np.linalg.norm(fitted) < _FLAT:
        return None
    b = np.linalg.solve(r, fitted)
    return np.clip(b[1:] / b[0], space.low, space.high) if b[0] > 0 else None  # 0: the reference feature is constant
