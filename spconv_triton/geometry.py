"""Where the taps of a convolution fall: kernel, stride, padding, dilation and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .arguments import check_count

IntPair = int | Sequence[int]


class Geometry(NamedTuple):
    """A 2-D convolution's window, in pixels, (vertical, horizontal) each."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H_out, W_out) for an input of ``height`` x ``width``; not positive where the window does not fit."""
        return self._output(height, 0), self._output(width, 1)

    def _output(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
        return (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1

    @property
    def centre(self) -> tuple[int, int]:
        """The input row and column that the centre tap of output pixel (0, 0) reads; negative inside the padding."""
        (kh, kw), (ph, pw), (dh, dw) = self.kernel_size, self.padding, self.dilation
        return dh * (kh - 1) // 2 - ph, dw * (kw - 1) // 2 - pw

    @property
    def is_centred(self) -> bool:
        """Whether padding is half the window, so that the centre tap of output (0, 0) is input (0, 0)."""
        return self.centre == (0, 0)

    @property
    def window(self) -> dict[str, Any]:
        """Stride, padding and dilation, as arguments."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]


def pair(name: str, value: object, minimum: int) -> tuple[int, int]:
    """``value`` as (vertical, horizontal).

    Raises:
        TypeError: not an int or a sequence of ints.
        ValueError: below ``minimum``, or a sequence of other than two.
    """
    values = (value, value) if isinstance(value, int) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if len(values) != 2 or min(values) < minimum:
        raise ValueError(f"{name} must be an int of at least {minimum}, or a pair of them, got {value!r}")
    return values[0], values[1]


def as_pair(value: Any) -> tuple[int, ...]:
    """An attribute of an ``nn.Conv2d`` as it is meant: it may have been assigned as one number, or NumPy's."""
    return tuple(map(int, value)) if hasattr(value, "__len__") else (int(value), int(value))


def resolve(
    kernel_size: IntPair,
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
    groups: int,
) -> Geometry:
    """Arguments as ``torch.nn.Conv2d`` takes them, checked, as a :class:`Geometry`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an even or non-positive kernel size, a non-positive stride, dilation or group count, a negative
            padding, an unknown padding word, or ``padding="same"`` with a stride.
    """
    kernel = pair("kernel_size", kernel_size, 1)
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd (the point-wise convolutions read the centre tap), got {kernel_size!r}"
        )
    strides = pair("stride", stride, 1)
    dilations = pair("dilation", dilation, 1)
    check_count("groups", groups)
    if not isinstance(padding, str):
        paddings = pair("padding", padding, 0)
    elif padding == "valid":
        paddings = (0, 0)
    elif padding == "same":
        if strides != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride={stride!r}")
        paddings = dilations[0] * (kernel[0] - 1) // 2, dilations[1] * (kernel[1] - 1) // 2
    else:
        raise ValueError(f"padding must be 'same', 'valid', an int or a pair of ints, got {padding!r}")
    # A single tap has no distance to another, and oneDNN gets some gradients wrong if it is told one.
    dilations = (1 if kernel[0] == 1 else dilations[0], 1 if kernel[1] == 1 else dilations[1])
    return Geometry(kernel, strides, paddings, dilations, groups)
