"""A run goes on in the middle of whatever loops its script has, and says so where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.same_file import assert_same
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import geomprobe
from geomprobe.errors import RunError, UsageError
from geomprobe.passes.checkpoint import store as checkpoint


class Cut(BaseException):
    """Ends a training as a kill does."""


class Training:
    """Builds a small model and trains it in the loops of a test; `cut` ends it before that many steps more."""

    def __init__(self, loops: Callable[[Training], None]) -> None:
        self.loops = loops
        self.cut: int | None = None

    def __call__(self) -> None:
        self.left, self.cut = self.cut, None
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.data = TensorDataset(torch.randn(20, 3), torch.randn(20, 1))
        self.loops(self)

    def attach(self, **stateful: Any) -> Any:
        return geomprobe.attach(self.model, self.optimizer, **stateful)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.model(batch[0]) - batch[1]).square().mean()

    def step(self, probe: Any, batch: list[Tensor]) -> Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Cut
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        probe.backward(loss)
        self.optimizer.step()
        return loss.detach()


def own_generator(t: Training) -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(t.data, 4, shuffle=True, generator=generator)
    probe = t.attach()
    for _ in probe.epochs(4):
        for batch in probe.batches(loader):
            t.step(probe, batch)


def generator_of_a_sampler(t: Training) -> None:
    sampler = RandomSampler(t.data, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(t.data, 4, sampler=sampler)
    probe = t.attach()
    for _ in probe.epochs(4):
        for batch in probe.batches(loader):
            t.step(probe, batch)


def loader_of_each_epoch(t: Training) -> None:
    probe = t.attach()
    for epoch in probe.epochs(4):
        generator = torch.Generator().manual_seed(epoch)
        for batch in probe.batches(DataLoader(t.data, 4, shuffle=True, generator=generator)):
            t.step(probe, batch)


def evaluation_before_and_after(t: Training) -> None:
    loader, held_out = DataLoader(t.data, 4, shuffle=True), DataLoader(t.data, 10, shuffle=True)
    probe = t.attach()
    for _ in probe.epochs(3):
        for _ in range(2):
            t.model.eval()
            with torch.no_grad():
                for batch in probe.batches(held_out):
                    t.loss(batch)
            t.model.train()
            for batch in probe.batches(loader):
                t.step(probe, batch)


def evaluation_that_forgets_no_grad(t: Training) -> None:
    loader, held_out = DataLoader(t.data, 4, shuffle=True), DataLoader(t.data, 10)
    probe = t.attach()
    for _ in probe.epochs(4):
        for batch in probe.batches(loader):
            t.step(probe, batch)
        for batch in held_out:
            t.loss(batch)


def two_stages(t: Training) -> None:
    loader = DataLoader(t.data, 4, shuffle=True)
    probe = t.attach()
    for count in (2, 3):
        for _ in probe.epochs(count):
            for batch in probe.batches(loader):
                t.step(probe, batch)
        t.model[0].weight.requires_grad_(False)


def drawn_between(t: Training) -> None:
    loader = DataLoader(t.data, 4, shuffle=True)
    probe = t.attach()
    for _ in probe.epochs(4):
        torch.rand(3)
        for batch in probe.batches(loader):
            t.step(probe, [batch[0] + 0.1 * torch.randn(3), batch[1]])
        torch.rand(1)


def accumulation_across_epochs(t: Training) -> None:
    loader = DataLoader(t.data, 4, shuffle=True)
    part = Counter()
    probe = t.attach(part=part)
    for _ in probe.epochs(4):
        for batch in probe.batches(loader):
            probe.backward(t.loss(batch) / 3)
            part.value += 1
            if part.value % 3 == 0:
                if t.left is not None:
                    t.left -= 1
                    if t.left < 0:
                        raise Cut
                t.optimizer.step()
                t.optimizer.zero_grad()


class Counter:
    """A number that is kept with the training."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


class Numbered:
    """A loader with a state of its own: it remembers how many batches it has given, and goes on from there."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.given, self.made = data, 0, 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        start, self.given = self.given, 0
        for batch in range(start, 5):
            self.given = batch + 1
            self.made += 1
            yield list(self.data[order[4 * batch : 4 * batch + 4]])
        self.given = 0

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def loader_with_a_state(t: Training) -> None:
    t.loader = Numbered(t.data)  # type: ignore[attr-defined]
    probe = t.attach()
    for _ in probe.epochs(4):
        for batch in probe.batches(t.loader):  # type: ignore[attr-defined]
            t.step(probe, batch)


LOOPS = [
    own_generator,
    generator_of_a_sampler,
    loader_of_each_epoch,
    evaluation_before_and_after,
    evaluation_that_forgets_no_grad,
    two_stages,
    drawn_between,
    accumulation_across_epochs,
    loader_with_a_state,
]


@pytest.mark.parametrize(
    ("loops", "every"),
    [
        pytest.param(loops, every, id=f"{every}-{loops.__name__}", marks=() if quick else pytest.mark.slow)
        for every, telling in (
            ("2steps", [own_generator, two_stages, accumulation_across_epochs, loader_with_a_state]),
            ("epoch", [loader_of_each_epoch]),
        )
        for loops in LOOPS
        for quick in [loops in telling]
    ],
)
def test_a_cut_run_goes_on_to_the_same_bits(tmp_path: Path, loops: Any, every: str) -> None:
    training, whole, run = Training(loops), tmp_path / "whole", tmp_path / "run"
    options = {"seed": 1, "checkpoint_every": every}
    geomprobe.record(training, whole, **options).close()
    steps = checkpoint.saved(whole / "checkpoints")
    assert len(steps) > 2
    for after in (8, 6) if loops is not accumulation_across_epochs else (3, 3):
        training.cut = after
        with pytest.raises(Cut):
            geomprobe.record(training, run, resume=True, **options)
    geomprobe.record(training, run, resume=True).close()
    assert_same(run / "record.h5", whole / "record.h5")
    assert checkpoint.saved(run / "checkpoints") == steps

    trace = geomprobe.replay(training, whole)
    assert trace.certificate["steps_equal"] == trace.num_steps
    for segment in (3, 1, 2):
        geomprobe.replay(training, run, segment=(segment, 3))
    assert_same(run / "trace.h5", whole / "trace.h5")


def test_a_loader_with_a_state_is_not_asked_again_for_what_it_gave(tmp_path: Path) -> None:
    training = Training(loader_with_a_state)
    training.cut = 8
    with pytest.raises(Cut):
        geomprobe.record(training, tmp_path / "run", seed=1, checkpoint_every="2steps")
    geomprobe.record(training, tmp_path / "run", resume=True).close()
    assert training.loader.made == 20 - 8  # type: ignore[attr-defined]


# What a script keeps to itself


def counted_in_a_variable(t: Training) -> None:
    loader = DataLoader(t.data, 4, shuffle=True)
    probe = t.attach()
    steps = 0
    for _ in probe.epochs(4):
        for batch in probe.batches(loader):
            t.optimizer.param_groups[0]["lr"] = 0.01 / (1 + steps)
            t.step(probe, batch)
            steps += 1


def test_state_that_attach_was_not_given_is_found_out_and_nothing_is_lost(tmp_path: Path) -> None:
    training, run = Training(counted_in_a_variable), tmp_path / "run"
    training.cut = 8
    with pytest.raises(Cut):
        geomprobe.record(training, run, seed=1)
    before = {path.name: path.read_bytes() for path in (run / "stream").iterdir()}
    with pytest.raises(RunError, match=r"holds step 5 already.*not given to attach.*--force starts over"):
        geomprobe.record(training, run, resume=True)
    after = {path.name: path.read_bytes() for path in (run / "stream").iterdir()}
    assert {name: after[name] for name in before} == before


def steps_outside_the_epochs(t: Training) -> None:
    loader = DataLoader(t.data, 4, shuffle=True)
    probe = t.attach()
    for batch in loader:
        t.step(probe, batch)
    for _ in probe.epochs(4):
        for batch in probe.batches(loader):
            t.step(probe, batch)


def test_steps_before_the_loop_over_epochs_are_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    training, run = Training(steps_outside_the_epochs), tmp_path / "run"
    training.cut = 18
    with pytest.raises(Cut):
        geomprobe.record(training, run, seed=1)
    with pytest.raises(RunError, match="takes a step, or ends, before its loop over epochs is back at epoch"):
        geomprobe.record(training, run, resume=True)


def fewer_epochs(t: Training) -> None:
    loader = DataLoader(t.data, 4, shuffle=True)
    probe = t.attach()
    for _ in probe.epochs(t.count):  # type: ignore[attr-defined]
        for batch in probe.batches(loader):
            t.step(probe, batch)


def test_a_loop_that_ends_before_the_checkpoint_is_refused(tmp_path: Path) -> None:
    training, run = Training(fewer_epochs), tmp_path / "run"
    training.cut, training.count = 18, 5  # type: ignore[attr-defined]
    with pytest.raises(Cut):
        geomprobe.record(training, run, seed=1)
    training.count = 2  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="the checkpoint is of epoch 3, and the script's loop has 2 epochs"):
        geomprobe.record(training, run, resume=True)


# Runs without checkpoints


def one_iterator_for_all(t: Training) -> None:
    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    loader = DataLoader(t.data, 4, shuffle=True)
    probe, batches = t.attach(), forever()
    for _ in probe.epochs(6):
        for _ in range(3):
            t.step(probe, next(batches))


def persistent_workers(t: Training) -> None:
    loader = DataLoader(t.data, 4, shuffle=True, num_workers=1, persistent_workers=True)
    probe = t.attach()
    for _ in probe.epochs(4):
        for batch in probe.batches(loader):
            t.step(probe, batch)


def no_epochs(t: Training) -> None:
    loader = DataLoader(t.data, 4, shuffle=True)
    probe = t.attach()
    for _ in range(4):
        for batch in probe.batches(loader):
            t.step(probe, batch)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("loops", "said"),
    [
        (one_iterator_for_all, "one pass over its loader lasts for several epochs"),
        (persistent_workers, "keeps its workers, and their random streams, from epoch to epoch"),
        (no_epochs, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_run_that_cannot_go_on_in_the_middle_starts_over_and_is_held_to_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loops: Any, said: str
) -> None:
    training, whole, run = Training(loops), tmp_path / "whole", tmp_path / "run"
    geomprobe.record(training, whole, seed=1).close()
    assert said in capsys.readouterr().err
    assert checkpoint.saved(whole / "checkpoints") == [0]
    training.cut = 14
    with pytest.raises(Cut):
        geomprobe.record(training, run, seed=1)
    geomprobe.record(training, run, resume=True).close()
    assert_same(run / "record.h5", whole / "record.h5")


# References that are kept on the way


def with_references(t: Training) -> None:
    loader = DataLoader(t.data, 4, shuffle=True)
    probe = t.attach()
    for _ in probe.epochs(4):
        for batch in probe.batches(loader):
            loss = t.step(probe, batch)
            probe.reference("best", if_lower=float(loss))
            t.path.append(([p.detach().clone() for p in t.model.parameters()], float(loss)))  # type: ignore[attr-defined]


def distance(weights: list[Tensor], others: list[Tensor]) -> float:
    pairs = zip(weights, others, strict=True)
    return float(sum((a.double() - b.double()).square().sum() for a, b in pairs)) ** 0.5


def test_the_best_iterate_and_averages_outlive_a_cut_and_are_measured_in_one_replay(tmp_path: Path) -> None:
    training, run = Training(with_references), tmp_path / "run"
    training.path = []  # type: ignore[attr-defined]
    kept = {"ema": (0.9,), "average": True, "reference_steps": (7,), "seed": 1}
    training.cut = 13
    with pytest.raises(Cut):
        geomprobe.record(training, run, **kept)
    geomprobe.record(training, run, resume=True).close()
    path: list[Any] = []
    training.path = path  # type: ignore[attr-defined]
    elsewhere = tmp_path / "elsewhere.pt"
    torch.save({name: torch.ones_like(p) for name, p in training.model.named_parameters()}, elsewhere)
    trace = geomprobe.replay(training, run, references={"ones": elsewhere})
    assert trace.references == ["final", "average", "best", "ema-0.9", "ones", "step-7"]

    torch.manual_seed(1)  # the first weights of the run
    first = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    start = [p.detach() for p in first.parameters()]
    iterates = [weights for weights, _ in path]
    ema = [w.double() for w in start]
    for weights in iterates:
        ema = [0.9 * e + 0.1 * w.double() for e, w in zip(ema, weights, strict=True)]
    wanted = {
        "best": min(path, key=lambda pair: pair[1])[0],
        "step-7": iterates[6],
        "average": [torch.stack([w[i].double() for w in iterates]).mean(0) for i in range(len(start))],
        "ema-0.9": ema,
        "ones": [torch.ones_like(w) for w in start],
    }
    for name, weights in wanted.items():
        column = trace[f"references/{name}/distance"]
        assert column[0] == pytest.approx(distance(start, weights), rel=1e-5)
        assert column[12] == pytest.approx(distance(iterates[11], weights), rel=1e-5)


def test_a_reference_from_elsewhere_cannot_take_the_name_of_one_of_the_run(tmp_path: Path) -> None:
    training, run = Training(no_epochs), tmp_path / "run"
    geomprobe.record(training, run, seed=1).close()
    with pytest.raises(UsageError, match="the recording has the references final, and another's name"):
        geomprobe.replay(training, run, references={"final": tmp_path / "x.pt"})


@pytest.mark.parametrize("name", ["final", "ones"])
def test_an_earlier_trace_is_kept_where_a_reference_from_elsewhere_is_wrong(tmp_path: Path, name: str) -> None:
    training, run = Training(no_epochs), tmp_path / "run"
    geomprobe.two_pass(training, run, seed=1)
    before = (run / "trace.h5").read_bytes()
    wrong = tmp_path / "wrong.pt"
    torch.save({"weight": torch.ones(3)}, wrong)
    with pytest.raises((UsageError, RunError)):
        geomprobe.replay(training, run, force=True, references={name: wrong})
    assert (run / "trace.h5").read_bytes() == before


def test_an_average_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a decay between 0 and 1"):
        geomprobe.record(Training(no_epochs), tmp_path / "run", ema=(1.5,))
    assert not (tmp_path / "run").exists()


def test_a_replay_goes_on_only_with_the_options_it_was_begun_with(tmp_path: Path) -> None:
    training, run = Training(own_generator), tmp_path / "run"
    geomprobe.record(training, run, seed=1).close()
    training.cut = 12
    with pytest.raises(Cut):
        geomprobe.replay(training, run)
    with pytest.raises(RunError, match="was replayed with every = 1, and now it is 2"):
        geomprobe.replay(training, run, resume=True, every=2)
    assert geomprobe.replay(training, run, resume=True).status == "complete"


def test_a_segment_whose_end_cannot_be_compared_says_so_and_the_run_goes_on_without_that_cut(
    tmp_path: Path,
) -> None:
    training, run = Training(own_generator), tmp_path / "run"
    geomprobe.record(training, run, seed=1).close()
    facts = checkpoint.folder(run / "checkpoints", 10) / checkpoint.FACTS
    facts.write_text(facts.read_text().replace("position", "positron"))
    with pytest.raises(RunError, match=r"step-00000010 is damaged.*its end cannot be compared.*--resume"):
        geomprobe.replay(training, run, segment=(1, 2))
    checkpoint.remove(run / "checkpoints", 10)
    assert geomprobe.replay(training, run, resume=True).status == "complete"
