"""After one pass of a real training, a sketch gives what all stored weights and gradients give, within its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import geomprobe

STEPS, SIZE = 120, 512


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Of a perceptron of 3,110 parameters on scikit-learn's digits: sketch, weights [T + 1, n] and gradients [T, n]."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = torch.from_numpy(digits.images).float().flatten(1) / 16, torch.from_numpy(digits.target).long()
    weights, gradients = [], []

    def flat(tensors: Any) -> Any:
        return torch.cat([each.detach().double().flatten() for each in tensors]).numpy()

    def train() -> None:
        model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10), nn.Linear(10, 10, bias=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        for _ in range(STEPS):
            batch = torch.randint(0, len(labels), (32,))
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            weights.append(flat(model.parameters()))
            gradients.append(flat(p.grad for p in model.parameters()))
            optimizer.step()
        weights.append(flat(model.parameters()))

    with geomprobe.record(train, tmp_path_factory.mktemp("digits") / "run", seed=0, sketch=SIZE) as record:
        return record.sketch, np.array(weights), np.array(gradients)


def cosines(a: Any, b: Any) -> Any:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("h", [1, 4, 16, 60])
def test_the_horizon_map(run: tuple[Any, Any, Any], h: int):
    sketch, w, g = run
    known = STEPS - h + 1
    exact = cosines(g[:known], (w[:-h] - w[h:])[:known])
    found = sketch.horizon_map([h])
    score = (found.cosine.value[0, :known] - exact) / found.cosine.error[0, :known]
    usual = exact < 0.95  # the first step is its own gradient: no error is left
    assert 0.7 < score[usual].std() < 1.3
    assert abs(score[usual]).max() < 5
    assert abs(found.mean.value[0] - exact.mean()) < 4.5 * found.mean.error[0]
    assert np.isnan(found.cosine.value[0, known:]).all()


@pytest.mark.parametrize("target", ["final", 80])
def test_gamma_against_the_end_and_against_an_earlier_step(run: tuple[Any, Any, Any], target: Any):
    sketch, w, g = run
    at = STEPS if target == "final" else target
    exact = cosines(g[:at], w[:at] - w[at])
    found = sketch.cosine(target)
    score = ((found.value[:at] - exact) / found.error[:at])[exact < 0.95]
    assert 0.5 < np.sqrt((score**2).mean()) < 1.5  # all steps share the target, so their errors are alike
    assert abs(score).max() < 5


def test_the_angles_between_gradients_and_the_distances(run: tuple[Any, Any, Any]):
    sketch, w, g = run
    pairs = np.triu_indices(STEPS, 1)
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    angles = sketch.gradient_cosines()
    score = (angles.value - unit @ unit.T)[pairs] / angles.error[pairs]
    assert 0.8 < score.std() < 1.2
    assert abs(score).max() < 6.5
    ways = np.linalg.norm(w[:STEPS, None] - w[:STEPS], axis=2)[pairs]
    distances = sketch.distances()
    score = (distances.value[pairs] - ways) / distances.error[pairs]
    assert 0.5 < np.sqrt((score**2).mean()) < 1.5
    assert abs(score).max() < 6.5
