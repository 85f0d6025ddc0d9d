"""Weights from elsewhere: every layout that people save, and each thing that may be wrong with one."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from geomprobe.errors import RunError, UsageError
from geomprobe.passes.references.weights_file import read_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.module = nn.Linear(2, 1)  # a name that DDP's prefix looks like


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def saved(tmp_path, thing):
    path = tmp_path / "weights.pt"
    torch.save(thing, path)
    return path


def assert_read(path, model, wanted=None):
    wanted = shapes(model) if wanted is None else wanted
    found = read_weights(path, wanted)
    assert list(found) == list(wanted)
    for got, parameter in zip(found.values(), model.parameters(), strict=True):
        assert torch.equal(got, parameter)
        assert not got.requires_grad
        assert type(got) is torch.Tensor


@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_state_dict_is_read_and_its_buffers_are_left_out(tmp_path, net, keep_vars):
    assert_read(saved(tmp_path, net.state_dict(keep_vars=keep_vars)), net)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_a_checkpoint_with_one_nesting_is_read(tmp_path, net, key):
    optimizer = torch.optim.Adam(net.parameters())
    assert_read(saved(tmp_path, {key: net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}), net)


def test_an_attribute_that_is_called_model_is_no_nesting(tmp_path):
    net = nn.ModuleDict({"model": nn.Linear(2, 2), "module": nn.Linear(1, 1)})
    assert_read(saved(tmp_path, net.state_dict()), net)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_make_no_difference_on_either_side(tmp_path, net, prefix):
    state = {prefix + name: value for name, value in net.state_dict().items()}
    assert_read(saved(tmp_path, state), net)
    wanted = {prefix + name: shape for name, shape in shapes(net).items()}
    assert_read(saved(tmp_path, net.state_dict()), net, wanted)
    assert_read(saved(tmp_path, {"state_dict": state}), net, wanted)


def test_a_part_of_the_model_may_be_compiled(tmp_path, net):
    state = {name.replace("conv.", "conv._orig_mod."): value for name, value in net.state_dict().items()}
    assert_read(saved(tmp_path, state), net)


def test_names_that_would_become_one_without_a_prefix_are_kept_apart(tmp_path):
    wanted = {"weight": (1,), "module.weight": (1,)}
    path = saved(tmp_path, {"weight": torch.ones(1), "module.weight": torch.zeros(1)})
    assert [tensor.item() for tensor in read_weights(path, wanted).values()] == [1, 0]
    with pytest.raises(RunError, match=r"has no weight of shape \[1\]: 1 of 2 parameters are missing"):
        read_weights(saved(tmp_path, {"module.weight": torch.zeros(1)}), wanted)


def test_the_files_dtype_is_kept(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(2, dtype=torch.bfloat16)})
    assert read_weights(path, {"w": (2,)})["w"].dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_safetensors_file_is_read(tmp_path, net, prefix):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file({prefix + name: value for name, value in net.state_dict().items()}, path)
    assert_read(path, net)


def test_a_missing_safetensors_names_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match=r"pip install 'geomprobe\[safetensors\]'"):
        read_weights(path, {"w": (1,)})


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_pickled_code_is_never_run(tmp_path, save):
    sprung, path = tmp_path / "sprung", tmp_path / "weights.pt"
    save({"w": torch.ones(1), "trap": Trap(sprung)}, path)
    with pytest.raises(RunError, match=r"weights\.pt cannot be read as weights: .*no pickled code is run"):
        read_weights(path, {"w": (1,)})
    assert not sprung.exists()


def test_a_pickled_model_is_refused(tmp_path, net):
    with pytest.raises(RunError, match=r"it holds more than tensors \(\S*Net\), .*torch\.save\(model"):
        read_weights(saved(tmp_path, net), shapes(net))


WRONG = {
    "missing": ({"v": torch.ones(1)}, r"has no w of shape \[2\]: 1 of 1 parameters are missing. It has v\."),
    "empty": ({}, r"It has nothing\."),
    "elsewhere": (
        {**{f"x{i}": 0 for i in range(9)}, "net.w": torch.ones(2)},
        r"It has net\.w\.",
    ),
    "many": ({f"x{i}": torch.ones(1) for i in range(9)}, r"It has x0, x1, x2, x3, x4, \.\.\.\."),
    "shape": ({"w": torch.ones(2, 1)}, r"w in .* has shape \[2, 1\], and the recorded model's has \[2\]"),
    "scalar": ({"w": torch.ones(())}, r"has shape \[\]"),
    "nan": ({"w": torch.tensor([1.0, float("nan")])}, r"w in .* is not finite: 1 of 2 values"),
    "infinite": ({"w": torch.full((2,), float("inf"), dtype=torch.float16)}, r"2 of 2 values are NaN"),
    "integer": ({"w": torch.ones(2, dtype=torch.int8)}, r"w in .* is torch\.int8, and weights are floating"),
    "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, r"torch\.complex64"),
    "number": ({"w": 1.0}, r"w in .* is float"),
    "list": ([torch.ones(2)], r"holds a list, not the weights"),
    "two": (
        {"model": {"w": torch.ones(2)}, "state_dict": {"w": torch.zeros(2)}},
        r"under state_dict and model: it is not clear",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named_with_the_file(tmp_path, wrong):
    thing, message = WRONG[wrong]
    path = saved(tmp_path, thing)
    with pytest.raises(RunError, match=message) as raised:
        read_weights(path, {"w": (2,)})
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_no_weights_is_refused(tmp_path, content, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(RunError, match="cannot be read as weights"):
        read_weights(path, {"w": (1,)})


def test_a_file_that_is_cut_off_is_refused(tmp_path, net):
    path = saved(tmp_path, net.state_dict())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RunError, match="cannot be read as weights"):
        read_weights(path, shapes(net))


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(RunError, match="nowhere does not exist"):
        read_weights(tmp_path / "nowhere", {"w": (1,)})
    with pytest.raises(RunError, match=r"is a folder.*checkpoint\.load"):
        read_weights(tmp_path, {"w": (1,)})
