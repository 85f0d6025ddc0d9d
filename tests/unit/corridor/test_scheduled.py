import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from geomprobe.corridor import CLR
from geomprobe.errors import UsageError


def make(**options):
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    return CLR([p], **options)


def rates(optimizer, scheduler, steps, loss=100.0):
    taken = []
    for _ in range(steps):
        optimizer.step(loss=torch.tensor(loss))
        scheduler.step()
        taken.append(optimizer.param_groups[0]["lr"].item())
    return taken


def reference(make_scheduler, base, steps):
    """The rates of plain SGD under the same scheduler."""
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler, taken = make_scheduler(sgd), []
    for _ in range(steps):
        taken.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return taken


SCHEDULERS = {
    "closed form": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "chained": lambda opt: lr_scheduler.StepLR(opt, step_size=2, gamma=0.5),
    "recursive": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=6, eta_min=0.1),
    "writing max_lr": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=4.0, total_steps=9, cycle_momentum=False),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduled_cap_bounds_the_measured_rate_as_sgd_would_be_scheduled(kind):
    optimizer = make(max_lr=2.0)
    scheduler = SCHEDULERS[kind](optimizer.scheduled("max_lr"))
    assert rates(optimizer, scheduler, 7) == pytest.approx(reference(SCHEDULERS[kind], 2.0, 7))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduled_scale_multiplies_the_measured_rate(kind):
    optimizer = make(scale=0.5)
    scheduler = SCHEDULERS[kind](optimizer.scheduled("scale"))
    expected = [100.0 * factor for factor in reference(SCHEDULERS[kind], 0.5, 7)]
    assert rates(optimizer, scheduler, 7) == pytest.approx(expected)


def test_a_plateau_lowers_the_cap():
    optimizer = make(max_lr=2.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer.scheduled("max_lr"), patience=0, factor=0.5)
    for metric in (1.0, 1.0, 1.0):
        optimizer.step(loss=torch.tensor(100.0))
        scheduler.step(metric)
    assert optimizer.param_groups[0]["max_lr"] == 0.5


def test_each_group_is_scheduled_from_its_own_value():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = CLR([{"params": [p]}, {"params": [q], "max_lr": 8.0}], max_lr=2.0)
    lr_scheduler.ConstantLR(optimizer.scheduled("max_lr"), factor=0.5)
    assert [group["max_lr"] for group in optimizer.param_groups] == [1.0, 4.0]


def test_a_schedule_continues_from_saved_states():
    def start():
        optimizer = make(max_lr=2.0)
        return optimizer, lr_scheduler.ExponentialLR(optimizer.scheduled("max_lr"), gamma=0.5)

    optimizer, scheduler = start()
    rates(optimizer, scheduler, 3)
    saved = optimizer.state_dict(), scheduler.state_dict()
    again, resumed = start()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert rates(again, resumed, 3) == rates(optimizer, scheduler, 3) == [0.25, 0.125, 0.0625]


def test_a_scheduler_on_the_optimizer_itself_is_refused_at_the_first_step():
    optimizer = make(max_lr=2.0)
    lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    with pytest.raises(UsageError, match=r'give the scheduler optimizer.scheduled\("max_lr"\)'):
        optimizer.step(loss=torch.tensor(1.0))


def test_what_cannot_be_scheduled_is_refused():
    with pytest.raises(UsageError, match="construct CLR with a finite max_lr"):
        make().scheduled("max_lr")
    with pytest.raises(UsageError, match="'max_lr' or 'scale', not 'lr'"):
        make().scheduled("lr")
