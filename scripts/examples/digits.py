"""Train a small ResNet on scikit-learn's handwritten digits: the quickstart's training script.

    python scripts/examples/digits.py                                     trains
    geomprobe record -o runs/digits scripts/examples/digits.py            trains, and records the run

The lines that name the probe are all that geomprobe needs of a script.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import geomprobe


class Digits(Dataset[tuple[Tensor, int]]):
    """The 1,797 digits of 8x8 pixels: every sixth is held out; those trained on are cropped and flipped."""

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        held_out = torch.arange(len(digits.target)) % 6 == 0
        keep = ~held_out if train else held_out
        self.images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)[keep]
        self.labels = torch.from_numpy(digits.target).long()[keep]
        self.augment = v2.Compose([v2.RandomCrop(8, padding=1), v2.RandomHorizontalFlip()]) if train else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return self.augment(image) if self.augment else image, int(self.labels[index])


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def small_resnet(width: int) -> nn.Module:
    """Three residual blocks, global average pooling, dropout and a linear layer."""
    return nn.Sequential(
        Block(1, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * width, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[Tensor, int]]) -> float:
    """Share of the held-out digits that are told right."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    model.train()
    return right / len(loader.dataset)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()

    model = small_resnet(arguments.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=arguments.momentum)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * arguments.epochs)
    loader = DataLoader(
        Digits(train=True), arguments.batch_size, shuffle=True, drop_last=True, num_workers=arguments.workers
    )
    held_out = DataLoader(Digits(train=False), 300)

    probe = geomprobe.attach(model, optimizer, scheduler=scheduler)
    for epoch in probe.epochs(arguments.epochs):
        for images, labels in probe.batches(loader):
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            probe.backward(loss)
            optimizer.step()
        scheduler.step()
        print(f"epoch {epoch + 1:3d}  loss {loss.item():.4f}  held-out accuracy {accuracy(model, held_out):.3f}")


if __name__ == "__main__":
    main()
