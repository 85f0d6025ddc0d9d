"""A step's quantities come by name, each with its columns; a new one is one class and one entry in a list."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from geomprobe.distributed.layout import Layout
from geomprobe.measure.measurement import QUANTITIES, Measurement
from geomprobe.measure.options import MeasureOptions
from geomprobe.measure.quantity import Combine, Part, Quantity, Step


class GradientL1(Quantity):
    """The sum of the gradient's magnitudes."""

    name = "grad_l1"
    columns = ("steps/grad_l1",)

    def local(self, step: Step) -> dict[str, Part]:
        counted = zip(step.vectors, self.training.layout.owned, strict=True)
        sums = [g.abs().sum(dtype=torch.float64) for g, counts in counted if g is not None and counts]
        return {"l1": Part(torch.stack(sums).sum(), Combine.SUM)}


class Heard(Quantity):
    """Every event, in order; each value in another way of combining."""

    name = "heard"
    option, cadence = "sharpness_every", "sharpness_every"
    columns = ("a", "b", "c")
    events: ClassVar[list[str]] = []

    def before_backward(self, loss: Tensor) -> None:
        self.events.append(f"before {loss.item():g}")

    def after_backward(self) -> None:
        self.events.append("after")

    def before_clipping(self, factor: Tensor | None) -> None:
        self.events.append("clipping")

    def gradients_dropped(self) -> None:
        self.events.append("dropped")

    def local(self, step: Step) -> dict[str, Part] | None:
        if step.number == 2:
            return None
        one = torch.ones(1, dtype=torch.float64)
        kinds = {"mean": Combine.MEAN, "gather": Combine.GATHER, "same": Combine.SAME}
        return {name: Part(i * one, how) for i, (name, how) in enumerate(kinds.items())}

    def finish(self, whole: Any) -> Tensor:
        assert {name: tuple(values.shape) for name, values in whole.items()} == {
            "mean": (1,),
            "gather": (1, 1),
            "same": (1,),
        }
        return super().finish(whole)


class Opaque(torch.autograd.Function):
    """Doubles its input; its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def measured(options: MeasureOptions, *more: type[Quantity], layout: Layout | None = None) -> tuple[Measurement, Any]:
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    probe: Any = SimpleNamespace(model=model, optimizer=optimizer, parameters=dict(model.named_parameters()), step=0)
    measurement = Measurement(probe, options, layout, quantities=(*QUANTITIES, *more))
    measurement.open({"final": {"weight": torch.zeros(1, 2, dtype=torch.float64)}})
    return measurement, probe


def backward(measurement: Measurement, probe: Any) -> None:
    loss = probe.model.weight.square().sum()
    measurement.differentiate(loss, None, loss.backward, True)


def row(measurement: Measurement, probe: Any, **means: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return measurement.row([p.grad for p in probe.parameters.values()], None, means)


def test_a_new_quantity_is_one_class_and_one_entry() -> None:
    measurement, probe = measured(MeasureOptions(), GradientL1)
    backward(measurement, probe)
    found = row(measurement, probe, loss=torch.tensor([5.0], dtype=torch.float64))
    assert found["grad_l1"].tolist() == [2.0 + 4.0]
    assert found["loss"].tolist() == [5.0]
    assert measurement.columns["grad_l1"] == ("steps/grad_l1",)


def test_every_column_has_a_value_and_each_quantity_its_own_name() -> None:
    measurement, probe = measured(MeasureOptions(before_clipping=True, per_parameter=True, sharpness_every=1))
    backward(measurement, probe)
    found = row(measurement, probe)
    assert list(found) == [*measurement.columns, "absent"]
    assert list(measurement.columns) == ["inner_products", "unclipped", "sharpness", "hg"]
    for name, columns in measurement.columns.items():
        assert found[name].shape == (len(columns),)
        assert found[name].isfinite().all()
    values = dict(zip(measurement.columns["hg"], found["hg"].tolist(), strict=True))
    assert values["inner_products/g.Hg"] == values["parameters/weight/g.Hg"] == 40.0  # H = 2, g = (2, -4)
    assert found["sharpness"].item() == pytest.approx(2.0)


def test_what_is_not_due_or_not_to_be_had_is_nan() -> None:
    measurement, probe = measured(MeasureOptions(every=2, sharpness_every=2, curvature_every=4), Heard)
    finite = []
    for probe.step in range(5):
        probe.optimizer.zero_grad()
        backward(measurement, probe)
        values = row(measurement, probe)
        assert values.pop("absent").item() == 0.0
        finite.append({name for name, value in values.items() if value.isfinite().all()})
    everything = {"inner_products", "sharpness", "hg", "heard"}
    assert finite == [everything, set(), {"inner_products", "sharpness"}, set(), everything]


def test_a_quantity_hears_the_events_that_it_defines() -> None:
    measurement, probe = measured(MeasureOptions(sharpness_every=1), Heard)
    Heard.events.clear()
    backward(measurement, probe)
    measurement.before_clipping(None)
    measurement.step_skipped()
    row(measurement, probe)
    assert Heard.events == ["before 5", "after", "clipping", "dropped"]
    loss = probe.model.weight.sum() * float("nan")
    with pytest.raises(ZeroDivisionError):
        measurement.differentiate(loss, None, lambda: 1 // 0, plain=False)  # type: ignore[arg-type,return-value]
    assert Heard.events[-1] == "after"


def test_giving_hg_up_in_a_step_takes_nothing_from_its_other_quantities(
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = Layout("DDP", owned=(True,))
    measurement, probe = measured(MeasureOptions(per_rank=True), layout=layout)
    weight = probe.model.weight
    backward(measurement, probe)  # g = (2, -4)
    blocked = Opaque.apply(weight).sum()  # (2, 2) more, and no second derivative
    measurement.differentiate(blocked, None, blocked.backward, True)
    found = row(measurement, probe)
    assert found["per_rank"].tolist() == [16.0 + 4.0, 4.0 + 4.0, 4.0 + 4.0]
    assert found["hg"].isnan().all()
    assert "OpaqueBackward" in measurement.curvature_found()["missing"]
    assert "from step 0 on, Hg is left out" in capsys.readouterr().err
