"""Averages of the weights: against closed forms in float64, bit for bit over a checkpoint, and inert."""

import copy
import io
import random

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from geomprobe.errors import RunError, UsageError
from geomprobe.passes.references.averages import Averages

DECAYS = (0.5, 0.999)


def path(steps, dtype=torch.float32, seed=0):
    """A random walk of two parameters, the first not contiguous: w_0 .. w_T."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 4, 4), (5,)]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    walk = []
    for _ in range(steps + 1):
        weights = [w + 0.1 * torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
        walk.append([w.to(dtype) for w in weights])
    return walk


def parameters(weights):
    conv, bias = (torch.nn.Parameter(w.clone()) for w in weights)
    conv.data = conv.data.to(memory_format=torch.channels_last)
    return {"conv.weight": conv, "bias": bias}


def follow(averages, held, walk):
    for weights in walk:
        with torch.no_grad():
            for parameter, value in zip(held.values(), weights, strict=True):
                parameter.copy_(value)
        averages.update()


def expected(walk, decay=None):
    """The closed forms, in float64: the weights that w_0 .. w_T have in the average."""
    stacked = [torch.stack([w[i].double() for w in walk]) for i in range(len(walk[0]))]
    last = len(walk) - 1
    if decay is None:
        shares = torch.tensor([0.0] + [1 / last] * last, dtype=torch.float64)
    else:
        shares = torch.tensor(
            [decay**last] + [(1 - decay) * decay ** (last - t) for t in range(1, last + 1)],
            dtype=torch.float64,
        )
    return [torch.tensordot(shares, w, 1) for w in stacked]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
)
def test_each_average_is_its_closed_form(dtype, tolerance):
    walk = path(200, dtype)
    held = parameters(walk[0])
    averages = Averages(held, decays=DECAYS, running=True)
    follow(averages, held, walk[1:])
    assert list(averages.weights) == ["ema-0.5", "ema-0.999", "average"]
    for name, decay in zip(averages.weights, (*DECAYS, None), strict=True):
        found = averages.weights[name]
        assert list(found) == ["conv.weight", "bias"]
        for got, want in zip(found.values(), expected(walk, decay), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_averages_keep_dtype_and_strides_and_only_narrow_ones_are_widened(dtype, kept):
    held = parameters(path(0, dtype)[0])
    weights = Averages(held, decays=[0.9]).weights["ema-0.9"]
    assert {tensor.dtype for tensor in weights.values()} == {kept}
    assert weights["conv.weight"].stride() == held["conv.weight"].stride()
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_narrow_parameters_are_followed_where_their_own_dtype_would_stand_still():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    averages = Averages({"w": weight}, decays=[0.999])
    weight.data.fill_(1.0078125)  # the next bfloat16
    for _ in range(5000):
        averages.update()
    assert averages.weights["ema-0.999"]["w"].item() == pytest.approx(1.0078125 - 0.0078125 * 0.999**5000, abs=1e-5)


def test_before_the_first_update_every_average_is_the_initial_weights_and_then_the_running_one_is_w1():
    walk = path(1)
    held = parameters(walk[0])
    averages = Averages(held, decays=[0.9], running=True)
    for tensors in averages.weights.values():
        assert all(torch.equal(tensors[name], held[name]) for name in held)
    follow(averages, held, walk[1:])
    assert all(torch.equal(averages.weights["average"][name], held[name]) for name in held)


def test_a_resumed_average_is_bitwise_the_one_that_went_on():
    walk = path(60, torch.bfloat16)
    held = parameters(walk[0])
    whole = Averages(held, decays=DECAYS, running=True)
    follow(whole, held, walk[1:31])
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    follow(whole, held, walk[31:])

    file.seek(0)
    fresh = parameters(walk[30])
    resumed = Averages(fresh, decays=DECAYS, running=True)
    places = [tensor.data_ptr() for tensors in resumed.weights.values() for tensor in tensors.values()]
    resumed.load_state_dict(torch.load(file, weights_only=True))
    follow(resumed, fresh, walk[31:])
    assert places == [tensor.data_ptr() for tensors in resumed.weights.values() for tensor in tensors.values()]
    for name, tensors in whole.weights.items():
        assert all(torch.equal(resumed.weights[name][each], tensor) for each, tensor in tensors.items())


def test_a_loaded_state_is_copied_and_not_shared():
    held = parameters(path(0)[0])
    averages = Averages(held, running=True)
    averages.update()
    state = copy.deepcopy(averages.state_dict())
    other = Averages(held, running=True)
    other.load_state_dict(state)
    before = copy.deepcopy(state)
    follow(other, held, path(3, seed=1))
    assert state["updates"] == 1
    assert torch.equal(state["averages"]["average"]["bias"], before["averages"]["average"]["bias"])


@pytest.mark.parametrize("change", ["decays", "shape", "dtype"])
def test_a_state_of_other_averages_is_refused_and_nothing_is_changed(change):
    weights = path(0)[0]
    held = parameters(weights)
    there = {
        "decays": Averages(held, decays=[0.5]),
        "shape": Averages(parameters([weights[0], torch.ones(6)]), decays=[0.9]),
        "dtype": Averages(parameters([w.double() for w in weights]), decays=[0.9]),
    }[change]
    averages = Averages(held, decays=[0.9])
    with pytest.raises(RunError, match=r"(ema-0\.[59]/(conv|bias)).*Resume with the averages"):
        averages.load_state_dict(there.state_dict())
    assert torch.equal(averages.weights["ema-0.9"]["bias"], held["bias"])


@pytest.mark.parametrize("decay", [0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(UsageError, match="between 0 and 1"):
        Averages(parameters(path(0)[0]), decays=[0.9, decay])


def test_the_name_is_the_shortest_that_gives_the_decay_back():
    decays = [0.1 + 0.2, 1e-05, 0.9999]
    assert list(Averages(parameters(path(0)[0]), decays=decays).weights) == [
        "ema-0.30000000000000004",
        "ema-1e-05",
        "ema-0.9999",
    ]


class Calls(TorchDispatchMode):
    """The operations that run inside, and whether any of them gave new memory."""

    def __init__(self, known):
        super().__init__()
        self.names = set()
        self.known = known
        self.allocated = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.add(function._schema.name)
        if isinstance(out, torch.Tensor):
            self.allocated |= out.data_ptr() not in self.known
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_allocates_nothing_and_changes_neither_weights_nor_generators(dtype):
    held = parameters(path(0, dtype)[0])
    averages = Averages(held, decays=DECAYS, running=True)
    versions = [parameter._version for parameter in held.values()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    known = {tensor.data_ptr() for tensors in averages.weights.values() for tensor in tensors.values()}
    known |= {source.data_ptr() for source in averages._sources}
    with Calls(known) as calls:
        averages.update()
    assert not calls.allocated
    assert calls.names <= {"aten::_foreach_lerp_", "aten::copy_"}
    assert [parameter._version for parameter in held.values()] == versions
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_storage_that_is_exchanged_under_a_parameter_is_followed():
    held = parameters(path(0)[0])
    averages = Averages(held, running=True)
    held["bias"].data = torch.full((5,), 7.0)
    averages.update()
    assert averages.weights["average"]["bias"].tolist() == [7.0] * 5
