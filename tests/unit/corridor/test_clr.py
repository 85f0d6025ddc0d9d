import io

import pytest
import torch
import torch.distributed as dist
from support.command_server import Command, server
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from geomprobe.corridor import CLR, ConvexCone, Quadratic
from geomprobe.errors import UnsupportedTraining, UsageError

NAN, INF = float("nan"), float("inf")


def parameter(*values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def with_gradient(values, gradient):
    p = parameter(*values)
    p.grad = torch.tensor(gradient, dtype=p.dtype)
    return p


def train(optimizer, loss_of, steps):
    """Rates of `steps` steps."""
    rates = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step(loss=loss)
        rates.append(optimizer.param_groups[0]["lr"])
    return torch.stack(rates)


def test_one_step_reaches_the_minimum_of_a_cone_split_over_groups():
    a, b, unused = parameter(3.0), parameter(4.0, 12.0), parameter(7.0)
    optimizer = CLR([{"params": [a, unused]}, {"params": [b]}])
    train(optimizer, lambda: 2.0 * torch.cat([a, b]).norm(), 1)
    assert torch.cat([a, b]).norm() < 1e-14
    assert unused.item() == 7.0
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx([6.5, 6.5], rel=1e-15)


def test_the_rate_is_that_of_the_closed_form_at_every_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
    optimizer = CLR(model.parameters(), e_star=0.1, max_lr=3.0, scale=0.5)
    for _ in range(20):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step(loss=loss)
        square = sum(p.grad.square().sum().item() for p in model.parameters())
        expected = min(0.5 * max(loss.item() - 0.1, 0.0) / square, 3.0)
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(expected, rel=1e-12)
        for old, new in zip(before, model.parameters(), strict=True):
            torch.testing.assert_close(new, old - expected * new.grad, rtol=1e-12, atol=1e-14)


def test_polyak_with_the_known_minimum_reaches_it_on_an_isotropic_bowl_with_half_the_rate():
    bowl = Quadratic(torch.eye(2, dtype=torch.float64), c=7.0, start=torch.tensor([3.0, -2.0]).double())
    train(CLR(bowl.parameters(), e_star=7.0, scale=2.0), bowl, 1)  # (E - E*) / |g|^2 is 1/2 there
    assert bowl().item() == pytest.approx(7.0, abs=1e-14)


def test_groups_may_have_their_own_scale_and_cap():
    a, b = with_gradient([0.0], [3.0]), with_gradient([0.0], [4.0])
    optimizer = CLR([{"params": [a]}, {"params": [b], "scale": 0.5, "max_lr": 0.7}], max_lr=1.5)
    optimizer.step(loss=torch.tensor(50.0))
    assert [group["lr"].item() for group in optimizer.param_groups] == [1.5, 0.7]
    optimizer.step(loss=torch.tensor(25.0))
    assert [group["lr"].item() for group in optimizer.param_groups] == [1.0, 0.5]
    assert (a.item(), b.item()) == pytest.approx((-3.0 * 2.5, -4.0 * 1.2))


def test_a_loss_below_e_star_is_a_step_of_rate_zero():
    p = with_gradient([1.0], [2.0])
    optimizer = CLR([p], e_star=3.0)
    optimizer.step(loss=torch.tensor(2.0))
    assert (p.item(), optimizer.param_groups[0]["lr"].item(), optimizer.skipped_steps.item()) == (1.0, 0.0, 0)


@pytest.mark.parametrize("max_lr", [None, 10.0])
@pytest.mark.parametrize(
    ("loss", "gradient"),
    [
        (1.0, [0.0, 0.0, 0.0]),
        (0.0, [0.0, 0.0, 0.0]),
        (1.0, [1.0, NAN, 0.0]),
        (1.0, [INF, 1.0, 0.0]),
        (NAN, [1.0, 1.0, 1.0]),
        (INF, [1.0, 1.0, 1.0]),
        (-INF, [1.0, 1.0, 1.0]),
        (NAN, [NAN, INF, 0.0]),
    ],
)
def test_unsound_steps_change_no_bit_and_are_counted(loss, gradient, max_lr):
    p, bystander = with_gradient([-0.0, 1.5, 1e-310], gradient), with_gradient([2.0], [0.0])
    before = p.detach().clone().view(torch.int64)
    optimizer = CLR([{"params": [p]}, {"params": [bystander]}], max_lr=max_lr)
    for count in (1, 2):
        optimizer.step(loss=torch.tensor(loss))
        assert torch.equal(p.detach().view(torch.int64), before)
        assert [group["skipped_steps"].item() for group in optimizer.param_groups] == [count, count]
        assert optimizer.param_groups[0]["lr"].item() == 0.0


def test_a_step_without_any_gradient_is_counted():
    optimizer = CLR([parameter(1.0)])
    optimizer.step(loss=torch.tensor(1.0))
    assert optimizer.skipped_steps.item() == 1


def test_a_group_may_be_empty():
    p = with_gradient([1.0], [2.0])
    optimizer = CLR([{"params": []}, {"params": [p]}])
    optimizer.step(loss=torch.tensor(2.0))
    assert p.item() == 0.0


def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned():
    cone = ConvexCone(2.0, start=[3.0, 4.0])
    optimizer = CLR(cone.parameters())

    def closure():
        loss = cone()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 10.0
    assert cone().item() < 1e-6


def test_the_loss_is_needed_exactly_once():
    optimizer = CLR([with_gradient([1.0], [1.0])])
    with pytest.raises(UsageError, match=r"step\(loss=loss\), or step\(closure\)"):
        optimizer.step()
    with pytest.raises(UsageError, match="one of the two"):
        optimizer.step(lambda: torch.tensor(1.0), loss=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be positive and finite, but it is 0.0 in parameter group 0"),
        ({"scale": NAN}, "but it is nan"),
        ({"max_lr": -1.0}, "max_lr must be positive or None, but it is -1.0"),
        ({"max_lr": NAN}, "but it is nan"),
        ({"e_star": INF}, "e_star must be finite, but it is inf"),
    ],
)
def test_bad_hyperparameters_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        CLR([parameter(1.0)], **options)


def test_a_group_with_an_lr_is_refused():
    with pytest.raises(ValueError, match=r"lr=0.1 was given in parameter group 1: set max_lr or scale"):
        CLR([{"params": [parameter(1.0)]}, {"params": [parameter(1.0)], "lr": 0.1}])


def test_what_the_rate_cannot_be_computed_from_is_refused():
    with pytest.raises(ValueError, match=r"one element, but its shape is \(3,\)"):
        CLR([with_gradient([1.0], [1.0])]).step(loss=torch.ones(3))
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedTraining, match="sparse=False"):
        CLR(table.parameters()).step(loss=torch.tensor(1.0))


def test_sharded_gradients_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(3, 2)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        loss = model(torch.ones(1, 3)).sum()
        loss.backward()
        with pytest.raises(UnsupportedTraining, match="use DDP, not FSDP2"):
            CLR(model.parameters()).step(loss=loss)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_summed_in_float32(dtype):
    p = parameter(*[0.0] * 1000, dtype=dtype)
    p.grad = torch.full_like(p, 100.0)  # the square of the norm, 1e7, is beyond float16
    optimizer = CLR([p, parameter(1.0)])
    optimizer.step(loss=torch.tensor(1e5))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-2, rel=1e-6)
    assert torch.equal(p.detach(), torch.full_like(p, -1.0))


def test_large_tensors_are_summed_to_float32_rounding_and_updated_in_batches():
    torch.manual_seed(0)
    shapes = [(700, 999), (3,), (3000, 1001), (2, 5)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters[2].data = parameters[2].data.t()
    for p in parameters:
        p.grad = torch.randn(p.shape) + 0.5
    optimizer = CLR(parameters)
    square = sum(p.grad.double().square().sum().item() for p in parameters)
    optimizer.step(loss=torch.tensor(2.0 * square))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(2.0, rel=1e-6)
    for p in parameters:
        torch.testing.assert_close(p.detach(), -2.0 * p.grad)


def make_run():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(32, 4)
    optimizer = CLR(model.parameters(), max_lr=0.5)
    return model, optimizer, lambda: (model(x) - x[:, :1]).square().mean()


def test_a_saved_state_continues_bit_for_bit_with_its_counters():
    model, optimizer, loss_of = make_run()
    optimizer.step(loss=torch.tensor(1.0))  # no gradient yet: skipped
    train(optimizer, loss_of, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    rates = train(optimizer, loss_of, 5)

    other, again, other_loss_of = make_run()
    file.seek(0)
    saved = torch.load(file)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert again.skipped_steps.item() == 1
    assert again.param_groups[0]["max_lr"] == 0.5
    assert torch.equal(train(again, other_loss_of, 5), rates)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_state_passes_through_torch_distributed_checkpoint():
    model, optimizer, loss_of = make_run()
    fresh = get_optimizer_state_dict(model, optimizer)  # steps an optimizer that has no state
    optimizer.step(loss=torch.tensor(NAN))
    train(optimizer, loss_of, 2)
    state = get_optimizer_state_dict(model, optimizer)
    assert fresh.keys() == state.keys()
    other, again, _ = make_run()
    set_optimizer_state_dict(other, again, state)
    assert again.skipped_steps.item() == 1
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_two_runs_have_the_same_bits():
    runs = []
    for _ in range(2):
        model, optimizer, loss_of = make_run()
        runs.append((train(optimizer, loss_of, 10), [p.detach().clone() for p in model.parameters()]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1], strict=True))


class HostSyncs(TorchDispatchMode):
    """Counts the calls that bring a device's value to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", [2.0, NAN])
def test_a_step_never_waits_for_the_host(loss):
    p, q, value = with_gradient([1.0], [1.0]), parameter(1.0), torch.tensor(loss)
    optimizer = CLR([{"params": [p]}, {"params": [q], "max_lr": 0.1}])
    with HostSyncs() as syncs:
        optimizer.step(loss=value)
        assert syncs.count == 0
        optimizer.param_groups[0]["lr"].item()
        assert syncs.count == 1  # the counter counts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_never_waits_for_the_host():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).cuda()
    model[2].bfloat16()
    optimizer = CLR(model.parameters(), max_lr=10.0)
    x = torch.randn(8, 64, device="cuda")
    loss = model[2](model[:2](x).bfloat16()).square().mean()
    loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(loss=loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    square = sum(p.grad.double().square().sum() for p in model.parameters())
    rate = min((loss.double() / square).item(), 10.0)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(rate, rel=1e-5)
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.double(), old.double() - rate * new.grad.double(), rtol=1e-2, atol=1e-5)


def test_the_rate_of_a_step_is_a_tensor_of_its_own_and_visible_to_post_hooks():
    seen = []
    p = with_gradient([0.0], [1.0])
    optimizer = CLR([p])
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(opt.param_groups[0]["lr"]))
    for loss in (1.0, 2.0):
        optimizer.step(loss=torch.tensor(loss))
    assert [rate.item() for rate in seen] == [1.0, 2.0]


def test_a_grad_scaler_passes_the_loss_on():
    p = parameter(3.0, 4.0)
    optimizer, scaler = CLR([p]), torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = p.norm()
    scaler.scale(loss).backward()
    scaler.step(optimizer, loss=loss)
    scaler.update()
    assert p.norm() < 1e-14


RANK = """
import sys, torch
import torch.distributed as dist
from geomprobe.corridor import CLR
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
p = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
p.grad = torch.tensor([2.0, 0.0], dtype=torch.float64)  # averaged already, as DDP leaves it
optimizer = CLR([p])
loss = torch.tensor([1.0, 7.0][rank])
optimizer.step(loss=loss)
optimizer.step(loss=torch.tensor([1.0, float("nan")][rank]))
print(p.tolist(), optimizer.skipped_steps.item(), loss.item())
dist.destroy_process_group()
"""


def test_ranks_take_the_rate_of_the_mean_loss_and_skip_together(tmp_path):
    commands = [["-c", RANK, rank, tmp_path / "store"] for rank in (0, 1)]
    ranks = [Command(server(), command, tmp_path) for command in commands]
    outputs = [rank.wait().out.strip() for rank in ranks]
    # The mean loss 4 over the square norm 4 is a rate of 1: from 1 to 1 - 1 * 2.
    assert outputs == ["[-1.0, 1.0] 1 1.0", "[-1.0, 1.0] 1 7.0"]
