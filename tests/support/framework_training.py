"""One training in three frameworks, and the plain loop that each of them amounts to.

    python framework_training.py lightning

The frameworks decide on the order of the samples: a run writes it to ``order.json``, and the plain loop reads it.
Dropout draws from a stream that is seeded anew at each batch, whatever a framework draws in between.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

SAMPLES, BATCH, EPOCHS, ACCUMULATE, CLIP = 24, 4, 3, 2, 0.5
UPDATES = EPOCHS * SAMPLES // (BATCH * ACCUMULATE)


class Samples(Dataset[dict[str, Tensor]]):
    """Sequences of tokens with labels; remembers the order in which they were asked for."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(30, (SAMPLES, 7), generator=generator)
        self.labels = torch.randint(3, (SAMPLES,), generator=generator)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked.append(index)
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """What makes a training stateful beyond its weights: BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.body = nn.Sequential(nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens).mean(1))


def classifier() -> Classifier:
    torch.manual_seed(9)
    return Classifier()


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(9)
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes, **heads, attn_implementation="eager"))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch["input_ids"]), batch["labels"])


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The mean over all micro-batches of an update, as this part of it."""
    whole = BATCH * ACCUMULATE if num_items_in_batch is None else num_items_in_batch
    return functional.cross_entropy(outputs["logits"], labels, reduction="sum") / whole


# In the frameworks


def by_lightning(samples: Samples) -> None:
    import lightning

    from geomprobe.integrations.lightning import GeomprobeCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(self.current_epoch * SAMPLES // BATCH + batch_idx)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss_of(self.model, batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("validation_loss", loss_of(self.model, batch))

        def configure_optimizers(self) -> Any:
            optimizer = momentum(self.model)
            return [optimizer], [{"scheduler": halving(optimizer), "interval": "step"}]

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        callbacks=[GeomprobeCallback()],
        **quiet,
    ).fit(Module(), DataLoader(samples, BATCH, shuffle=True), DataLoader(Samples(), 8))


def by_transformers(samples: Samples) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from geomprobe.integrations.transformers import GeomprobeCallback

    class Reseed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.manual_seed(state.global_step)

    arguments = TrainingArguments(
        output_dir="trainer",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATE,
        learning_rate=1e-2,
        weight_decay=1e-2,
        max_grad_norm=CLIP,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="epoch",
        disable_tqdm=True,
    )
    Trainer(
        bert(),
        arguments,
        train_dataset=samples,
        eval_dataset=Samples(),
        compute_loss_func=summed_loss,
        callbacks=[GeomprobeCallback(), Reseed()],
    ).train()


class Counter:
    """Numbers the batches, in a run that goes on in mid-epoch, too."""

    number = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def by_accelerate(samples: Samples) -> None:
    from accelerate import Accelerator

    from geomprobe.integrations.accelerate import attach

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model = classifier()
    optimizer = momentum(model)
    loader = DataLoader(samples, BATCH, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, halving(optimizer))
    batches = Counter()
    probe = attach(accelerator, model, optimizer, scheduler=scheduler, batches=batches)
    for _ in probe.epochs(EPOCHS):
        for batch in probe.batches(loader):
            torch.manual_seed(batches.number)
            batches.number += 1
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


FRAMEWORKS = {"lightning": by_lightning, "transformers": by_transformers, "accelerate": by_accelerate}


# What they amount to

Watch = Callable[[int, torch.optim.Optimizer, list[Tensor]], None]


def plain(framework: str, order: Sequence[int], watch: Watch) -> torch.optim.Optimizer:
    """Train as a framework does, on the samples in its order.

    Args:
        framework: its name.
        order: the samples.
        watch: told of the epoch, the optimizer and the losses, with their graphs, before each update.

    Returns:
        The optimizer, when training is over.
    """
    model: Any = bert() if framework == "transformers" else classifier()
    model.train()
    optimizer, scheduler = _trainers_own(model) if framework == "transformers" else _momentum(model)
    samples, losses = Samples(), []
    for index, start in enumerate(range(0, len(order), BATCH)):
        chosen = [samples[i] for i in order[start : start + BATCH]]
        batch = {name: torch.stack([sample[name] for sample in chosen]) for name in chosen[0]}
        if framework == "transformers":
            if index % ACCUMULATE == 0:
                torch.manual_seed(index // ACCUMULATE)
            losses.append(summed_loss(model(input_ids=batch["input_ids"]), batch["labels"]))
        else:
            torch.manual_seed(index)
            losses.append(loss_of(model, batch) / ACCUMULATE)
        losses[-1].backward(retain_graph=True)
        if len(losses) < ACCUMULATE:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        watch(index // (SAMPLES // BATCH), optimizer, losses)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses = []
    return optimizer


def _momentum(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = momentum(model)
    return optimizer, halving(optimizer)


def _trainers_own(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW without weight decay of biases and norms, and a rate that falls linearly to 0."""
    named = dict(model.named_parameters())
    free = {name for name in named if name.endswith("bias") or "LayerNorm" in name}
    groups = [
        {"params": [p for name, p in named.items() if name not in free], "weight_decay": 1e-2},
        {"params": [named[name] for name in named if name in free], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / UPDATES)


if __name__ == "__main__":
    training_samples = Samples()
    FRAMEWORKS[sys.argv[1]](training_samples)
    Path("order.json").write_text(json.dumps(training_samples.asked))
