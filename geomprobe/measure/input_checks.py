"""What the inner products need of weights, references and gradients: real, dense, and of one shape and device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from geomprobe.errors import UnsupportedTraining, UsageError

LAYOUTS = (torch.strided, torch.sparse_coo)


def require_parameters(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that cannot be measured.

    Raises:
        UsageError: there are none.
        UnsupportedTraining: one is complex, integer or not dense, or they lie on several devices.

    >>> require_parameters([torch.ones(2)])
    """
    if not parameters:
        raise UsageError("there are no parameters to measure. Attach to a model that has some.")
    for index, parameter in enumerate(parameters):
        if not parameter.is_floating_point() or parameter.layout is not torch.strided:
            raise UnsupportedTraining(
                f"parameter {index} is {parameter.dtype}, {parameter.layout}: only dense real parameters "
                "are measured. Hold complex ones as real tensors (torch.view_as_real)."
            )
        if parameter.device != parameters[0].device:
            raise UnsupportedTraining(
                f"parameter {index} is on {parameter.device}, parameter 0 on {parameters[0].device}. "
                "Train with all parameters of a process on one device."
            )


def require_reference(name: str, reference: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Refuse a reference that has not the shapes and the device of the parameters.

    Raises:
        UsageError: it does not match them.

    >>> require_reference("final", [torch.zeros(2)], [torch.ones(2)])
    """
    found, needed = ([f"{list(t.shape)} on {t.device}" for t in ts] for ts in (reference, parameters))
    for index, (a, b) in enumerate(zip_longest(found, needed, fillvalue="missing")):
        if a != b:
            raise UsageError(
                f"reference {name!r} does not match the parameters: tensor {index} is {a}, parameter {index} "
                f"is {b}. Load a reference of this model, onto its device."
            )


def require_gradients(
    parameters: Sequence[Tensor], shapes: Sequence[torch.Size], gradients: Sequence[Tensor | None]
) -> None:
    """Refuse parameters and gradients that have not the shapes that the parameters had.

    Raises:
        UnsupportedTraining: a parameter changed its shape, or a gradient does not match its parameter.

    >>> require_gradients([torch.ones(2)], [torch.Size([2])], [None])
    """
    if len(gradients) != len(parameters):
        raise UnsupportedTraining(
            f"{len(gradients)} gradients for {len(parameters)} parameters. Give each one or None."
        )
    rows = zip(parameters, shapes, gradients, strict=True)
    for index, (parameter, shape, gradient) in enumerate(rows):
        if parameter.shape != shape:
            raise UnsupportedTraining(
                f"parameter {index} changed its shape from {list(shape)} to "
                f"{list(parameter.shape)}: its distance to a reference is undefined. Keep the shapes fixed."
            )
        if gradient is not None and (gradient.shape != shape or gradient.layout not in LAYOUTS):
            raise UnsupportedTraining(
                f"the gradient of parameter {index} is {gradient.layout} {list(gradient.shape)}, the "
                f"parameter {list(shape)}. Give a dense or sparse COO gradient of its shape."
            )
