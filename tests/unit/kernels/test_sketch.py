"""All ways to project give the same numbers, of any tensors in any pieces."""

import numpy as np
import pytest
import torch

from geomprobe.kernels.sketch import Projector, numbered
from geomprobe.trace import projection

CPU = torch.device("cpu")
WAYS = ["numpy", "torch", "numba"]
SIZES = [2, 7, 64, 1000]


@pytest.fixture(params=WAYS)
def way(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


def tensors():
    torch.manual_seed(0)
    return [
        torch.randn(8, 3, 5, 5),
        torch.randn(()),
        torch.randn(0, 4),
        torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(40, 31).t(),
        torch.randn(17).bfloat16(),
        torch.randn(9).double(),
        torch.randn(300).half(),
        torch.randn(50)[::3],
    ]


def reference(found, size):
    flat = torch.cat([torch.zeros(0), *(each.double().reshape(-1) for each in found)])
    out = np.zeros(size)
    projection.add(flat.numpy(), 0, out)
    return torch.from_numpy(out)


@pytest.mark.parametrize("size", SIZES)
def test_every_way_gives_the_numbers_of_the_definition(way, size):
    w = tensors()
    found = Projector(size, CPU, way=way)(numbered(w, w))
    norm = sum(each.double().square().sum() for each in w).sqrt()
    assert (found - reference(w, size)).abs().max() <= (1e-14 * norm if way == "torch" else 0)


def test_the_size_of_pieces_changes_no_bit_on_a_cpu_and_only_rounding_elsewhere(way, monkeypatch):
    w = tensors()
    projector = Projector(64, CPU, way=way)
    whole = projector(numbered(w, w))
    monkeypatch.setattr("geomprobe.kernels.sketch.CPU_CHUNK", 10)
    projector.chunk = 100
    assert (projector(numbered(w, w)) - whole).abs().max() <= (1e-13 if way == "torch" else 0)


def test_a_parameter_without_a_gradient_or_owned_elsewhere_is_zero_and_keeps_its_numbers(way):
    w = tensors()
    zero = [torch.zeros_like(each) for each in w]
    projector = Projector(64, CPU, way=way)
    kept = [None if i in (0, 3) else each for i, each in enumerate(w)]
    owned = [i not in (0, 3) for i in range(len(w))]
    wanted = projector(
        numbered([z if i in (0, 3) else each for i, (each, z) in enumerate(zip(w, zero, strict=True))], w)
    )
    assert torch.equal(projector(numbered(kept, w)), wanted)
    assert torch.equal(projector(numbered(w, w, owned)), wanted)


@pytest.mark.parametrize("sparse_dims", [1, 2])
def test_a_sparse_gradient_is_its_dense_values(way, sparse_dims):
    parameters = [torch.zeros(5), torch.zeros(6, 4), torch.zeros(3)]
    dense = torch.zeros(6, 4)
    dense[1], dense[4] = torch.randn(4), torch.randn(4)
    sparse = dense.to_sparse(sparse_dims)
    twice = torch.sparse_coo_tensor(
        torch.cat([sparse.indices()] * 2, 1), torch.cat([sparse.values() / 2] * 2), dense.shape, check_invariants=True
    )
    projector = Projector(16, CPU, way=way)
    others = torch.randn(5), torch.randn(3)
    wanted = projector(numbered([others[0], dense, others[1]], parameters))
    assert torch.equal(projector(numbered([others[0], twice, others[1]], parameters)), wanted)


def test_the_numbers_of_a_large_model_do_not_overflow(way):
    far = (1 << 40) + 12345
    x = torch.randn(1000)
    out = np.zeros(64)
    projection.add(x.numpy(), far, out)
    assert np.allclose(Projector(64, CPU, way=way)([(far, x)]).numpy(), out, rtol=0, atol=1e-12)


def test_infinities_and_nan_come_through(way):
    x = torch.tensor([1.0, torch.inf, torch.nan, 2.0])
    found = Projector(4, CPU, way=way)([(0, x)])
    assert (found.isinf().sum(), found.isnan().sum()) == (1, 1)


def test_nothing_of_the_run_changes(way):
    w = [torch.randn(30, requires_grad=True)]
    before, state = w[0].detach().clone(), torch.get_rng_state()
    found = Projector(8, CPU, way=way)(numbered(w, w))
    assert not found.requires_grad
    assert torch.equal(before, w[0])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_bits_each_time_and_the_cpu_s_numbers():
    device = torch.device("cuda")
    w = [torch.randn(3_000_001), torch.randn(64, 3, 7, 7), torch.randn(5).bfloat16()]
    on_device = [each.to(device) for each in w]
    found = [Projector(4096, device)(numbered(on_device, on_device)) for _ in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.allclose(found[0].cpu(), Projector(4096, CPU)(numbered(w, w)), rtol=0, atol=1e-10)
