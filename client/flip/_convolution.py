"""Gradients of convolutions with respect to their input alone, on a CPU, for models whose parameters are frozen.

The gradient of a convolution with stride 1 is itself a convolution, with the kernel turned by half a turn, and as such
twice as fast in oneDNN as its backward pass. Towards an input of few channels (a model's first layer, nine tenths of an
inversion's backward pass before) it is a matrix product over blocks of 4 x 4 outputs, whose parts are added up.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 4  # outputs per side that one row of the matrix product covers
FEW_CHANNELS = 4

InputGradient = Callable[[Tensor], Tensor]  # gradient of the output [n, out, h, w] -> of the input [n, in, H, W]


@contextlib.contextmanager
def fast_input_gradients(model: nn.Module) -> Iterator[None]:
    """Let the convolutions of a frozen model on the CPU compute input gradients the fast way; not those of weights."""
    changed = [m for m in model.modules() if isinstance(m, nn.Conv2d) and _fits(m)]
    try:
        for module in changed:
            module.__dict__["forward"] = _forward(module)  # the instance's own attribute hides the class's method
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _fits(module: nn.Conv2d) -> bool:
    simple = module.stride == (1, 1) and module.dilation == (1, 1) and module.groups == 1
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    narrow = all(p < k for p, k in zip(module.padding, module.kernel_size, strict=True))
    return simple and narrow and module.weight.device.type == "cpu" and "forward" not in module.__dict__


def _forward(module: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    rows, columns = (int(p) for p in module.padding)
    backward = _blocked(weight, rows, columns) if weight.shape[1] <= FEW_CHANNELS else _turned(weight, rows, columns)
    return lambda inputs: _Convolution.apply(inputs, weight, bias, (rows, columns), backward)  # type: ignore[return-value]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], back: InputGradient
    ) -> Tensor:
        ctx.back = back
        return functional.conv2d(inputs, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return ctx.back(gradient), None, None, None, None


def _turned(weight: Tensor, rows: int, columns: int) -> InputGradient:
    """The gradient as a convolution with the turned kernel; `rows`, `columns`: the forward pass's padding."""
    turned = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    padding = (weight.shape[2] - 1 - rows, weight.shape[3] - 1 - columns)
    return lambda gradient: functional.conv2d(gradient, turned, padding=padding)


def _blocked(weight: Tensor, rows: int, columns: int) -> InputGradient:
    """The gradient as one matrix product: a row is the outputs of a block, a column an input of the blocks it meets."""
    outs, ins, height, width = weight.shape
    down, right = (BLOCK + height - 2) // BLOCK + 1, (BLOCK + width - 2) // BLOCK + 1  # blocks of inputs it meets
    kernels = weight.new_zeros(BLOCK, BLOCK, outs, down * BLOCK, right * BLOCK, ins)
    for i in range(BLOCK):
        for j in range(BLOCK):
            kernels[i, j, :, i : i + height, j : j + width] = weight.permute(0, 2, 3, 1)
    kernels = kernels.view(BLOCK * BLOCK * outs, down, BLOCK, right, BLOCK, ins).permute(0, 1, 3, 2, 4, 5)
    matrix = kernels.reshape(BLOCK * BLOCK * outs, -1)

    def back(gradient: Tensor) -> Tensor:
        num, _, h, w = gradient.shape
        padded = gradient.permute(0, 2, 3, 1)
        if h % BLOCK or w % BLOCK:
            padded = functional.pad(padded, (0, 0, 0, -w % BLOCK, 0, -h % BLOCK))
        tall, wide = padded.shape[1] // BLOCK, padded.shape[2] // BLOCK
        blocks = padded.view(num, tall, BLOCK, wide, BLOCK, outs).transpose(2, 3).reshape(-1, BLOCK * BLOCK * outs)
        parts = (blocks @ matrix).view(num, tall, wide, down, right, BLOCK, BLOCK, ins)
        total = parts.new_zeros(num, tall + down - 1, wide + right - 1, BLOCK, BLOCK, ins)
        for i in range(down):
            for j in range(right):
                total[:, i : i + tall, j : j + wide] += parts[:, :, :, i, j]
        whole = total.transpose(2, 3).reshape(num, total.shape[1] * BLOCK, total.shape[2] * BLOCK, ins)
        inside = whole[:, rows : h + height - 1 - rows, columns : w + width - 1 - columns]
        return inside.permute(0, 3, 1, 2)

    return back
