import numpy as np
import pytest
import torch

from geomprobe.corridor import AsymmetricLinear, RandomWalk, SinusoidalMixture
from geomprobe.trace import geometry

F64 = torch.float64


def cosines(module, lr, steps):
    """The cosine to the last iterate at each step of SGD."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    weights, gradients = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        module().backward()
        weights.append(module.theta.detach().clone())
        gradients.append(module.theta.grad.clone())
        optimizer.step()
    d, g = torch.stack(weights) - module.theta.detach(), torch.stack(gradients)
    return geometry.cosine(*((a * b).sum(1).numpy() for a, b in ((g, d), (g, g), (d, d))))


def test_alm_is_eq_9_over_all_samples():
    model = AsymmetricLinear(3, samples=10, dtype=F64)
    w = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    pairs = zip(model.inputs.tolist(), model.targets.tolist(), strict=True)
    expected = sum(max(0.0, float(np.dot(x, w.numpy())) - y) ** 2 for x, y in pairs)
    assert model.energy(w).item() == pytest.approx(expected, rel=1e-13)


def test_alm_draws_minibatches_that_average_to_the_whole():
    model = AsymmetricLinear(5, samples=40, batch_size=4, generator=torch.Generator().manual_seed(0))
    losses = torch.stack([model().detach() for _ in range(4000)])
    whole = model.energy(model.theta).item()
    assert losses.std() > 0.1 * losses.mean()
    assert losses.mean().item() == pytest.approx(whole * 4 / 40, rel=0.05)


def test_alm_repeats_with_the_global_seed():
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        model = AsymmetricLinear(5)
        runs.append([model().item() for _ in range(5)])
    assert runs[0] == runs[1]


def test_sm_is_eq_9():
    mixture = SinusoidalMixture(4, dtype=F64)
    w, a = mixture.theta.detach().numpy(), mixture.frequencies.numpy()
    assert mixture().item() == pytest.approx(np.sum(w**2) + 100 * np.sum(np.sin(a * w) ** 2), rel=1e-14)


def test_alm_turns_away_from_its_end_although_it_is_convex():
    torch.manual_seed(0)
    cosine = cosines(AsymmetricLinear(20, dtype=F64), lr=1e-3, steps=1000)
    assert np.mean(cosine < 0) > 0.1


def test_sm_turns_away_from_its_end_although_it_is_deterministic():
    cosine = cosines(SinusoidalMixture(100, dtype=F64), lr=1e-2, steps=300)
    assert np.mean(cosine < 0) > 0.1


def test_a_random_walk_has_fresh_independent_unit_gradients():
    walk = RandomWalk(20_000, generator=torch.Generator().manual_seed(0), dtype=F64)
    gradients = torch.stack([torch.autograd.grad(walk(), walk.theta)[0] for _ in range(8)])
    torch.testing.assert_close(gradients @ gradients.T, torch.eye(8, dtype=F64), rtol=0, atol=0.04)
