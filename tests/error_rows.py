"""Mistakes in the arguments of the functions and the layer: what is wrong, the exception, and parts of its message.

What is wrong is the source of keyword arguments, which :mod:`error_cases` puts into an otherwise right call.
"""

from __future__ import annotations

Row = tuple[str, type[Exception], tuple[str, ...]]
Rows = list[Row]

WINDOW: Rows = [
    ("stride=0", ValueError, ("stride", "at least 1", "got 0")),
    ("stride=(1, -1)", ValueError, ("stride", "at least 1", "got (1, -1)")),
    ("stride=2.0", TypeError, ("stride", "an int or a pair of ints", "got 2.0")),
    ("stride=True", TypeError, ("stride", "an int or a pair of ints", "got True")),
    ("stride=(True, 1)", TypeError, ("stride", "a pair of ints", "got (True, 1)")),
    ("stride=(1, 1, 1)", ValueError, ("stride", "or a pair of them", "got (1, 1, 1)")),
    ("stride='same'", TypeError, ("stride", "an int or a pair of ints", "got 'same'")),
    ("stride=None", TypeError, ("stride", "an int or a pair of ints", "got None")),
    ("stride=()", ValueError, ("stride", "or a pair of them", "got ()")),
    ("stride=(1,)", ValueError, ("stride", "or a pair of them", "got (1,)")),
    ("padding=-1", ValueError, ("padding", "at least 0", "got -1")),
    ("padding=(0.5, 1)", TypeError, ("padding", "a pair of ints", "got (0.5, 1)")),
    ("padding=False", TypeError, ("padding", "a pair of ints", "got False")),
    ("padding=(1, 1, 1, 1)", ValueError, ("padding", "or a pair of them", "got (1, 1, 1, 1)")),
    ("padding='full'", ValueError, ("padding", "'same', 'valid'", "got 'full'")),
    ("padding='same', stride=2", ValueError, ("padding='same'", "stride 1", "stride=2")),
    ("dilation=0", ValueError, ("dilation", "at least 1", "got 0")),
    ("dilation=1.5", TypeError, ("dilation", "a pair of ints", "got 1.5")),
    ("dilation=True", TypeError, ("dilation", "a pair of ints", "got True")),
]

GROUPS: Rows = [
    ("groups=0", ValueError, ("groups", "at least 1", "got 0")),
    ("groups=-2", ValueError, ("groups", "at least 1", "got -2")),
    ("groups=2.0", TypeError, ("groups", "an int", "got 2.0")),
    ("groups=True", TypeError, ("groups", "an int", "got True")),
    ("groups=(2, 2)", TypeError, ("groups", "an int", "got (2, 2)")),
    ("groups=None", TypeError, ("groups", "an int", "got None")),
    ("groups=3", ValueError, ("groups", "divide", "4", "6", "got 3")),
    ("groups=4", ValueError, ("groups", "divide", "4", "6", "got 4")),
]

BACKEND: Rows = [
    ("backend='cuda'", ValueError, ("backend", "'auto', 'triton', 'native', 'reference'", "got 'cuda'")),
    ("backend=None", ValueError, ("backend", "'auto', 'triton', 'native', 'reference'", "got None")),
    ("backend=['auto']", ValueError, ("backend", "'auto', 'triton', 'native', 'reference'", "got ['auto']")),
]

BRANCH_WEIGHTS: Rows = [
    ("weight_gwc=None", TypeError, ("weight_gwc", "torch.Tensor", "got NoneType")),
    ("weight_gwc=ones(6, 2, 9)", ValueError, ("weight_gwc", "4 dimensions", "got 3: [6, 2, 9]")),
    ("weight_gwc=ones(6, 2, 3, 4)", ValueError, ("kernel_size", "odd", "got (3, 4)")),
    ("weight_gwc=ones(6, 2, 0, 3)", ValueError, ("kernel_size", "at least 1", "got (0, 3)")),
    ("weight_gwc=ones(6, 4, 3, 3)", ValueError, ("weight_gwc", "alpha L = 4", "G = 2", "got [6, 4, 3, 3]")),
    ("weight_gwc=ones(8, 2, 3, 3)", ValueError, ("weight_pwc", "[8, ", "got [6, 4, 1, 1]")),
    (
        "weight_gwc=ones(6, 2, 3, 3, dtype=torch.float64)",
        TypeError,
        ("weight_gwc", "torch.float32", "got torch.float64"),
    ),
    ("weight_gwc=ones(6, 2, 3, 3, device='meta')", ValueError, ("weight_gwc", "cpu", "got meta")),
    ("weight_gwc=weight_gwc.to_sparse()", TypeError, ("weight_gwc must be dense", "layout torch.sparse_coo")),
    ("weight_pwc=weight_pwc.to_mkldnn()", TypeError, ("weight_pwc must be dense", "layout torch._mkldnn")),
    ("weight_pwc=None", TypeError, ("weight_pwc", "torch.Tensor", "got NoneType")),
    ("weight_pwc=ones(6, 4)", ValueError, ("weight_pwc", "[6, alpha L, 1, 1]", "got [6, 4]")),
    ("weight_pwc=ones(6, 4, 3, 3)", ValueError, ("weight_pwc", "[6, alpha L, 1, 1]", "got [6, 4, 3, 3]")),
    ("weight_pwc=ones(4, 4, 1, 1)", ValueError, ("weight_pwc", "[6, ", "got [4, 4, 1, 1]")),
    ("weight_pwc=ones(6, 6, 1, 1)", ValueError, ("weight_gwc", "alpha L = 6", "G = 2", "got [6, 2, 3, 3]")),
    ("weight_pwc=ones(6, 4, 1, 1, dtype=torch.float16)", TypeError, ("weight_pwc", "float32", "got torch.float16")),
    ("weight_pwc=ones(6, 4, 1, 1, device='meta')", ValueError, ("weight_pwc", "cpu", "got meta")),
    ("weight_gwc=ones(6, 0, 3, 3), weight_pwc=ones(6, 0, 1, 1)", ValueError, ("weight_gwc", "alpha L = 0")),
    (
        "weight_gwc=ones(0, 2, 3, 3), weight_pwc=ones(0, 4, 1, 1)",
        ValueError,
        ("weight_gwc", "at least one output channel", "got [0, 2, 3, 3]"),
    ),
]

LAYER: Rows = [
    ("x=ones(2, 9, 6, 5)", ValueError, ("x must", "8 channels", "4 representative", "got 9")),
    ("x=ones(2, 7, 6, 5)", ValueError, ("x must", "8 channels", "4 representative", "got 7")),
    ("x=ones(2, 3, 6, 5)", ValueError, ("x must", "at least the 4", "got 3 channels")),
    ("weight_redundant=None", ValueError, ("4 channels", "weight_redundant is None", "got 8")),
    ("weight_redundant=[1.0]", TypeError, ("weight_redundant", "torch.Tensor", "got list")),
    ("weight_redundant=ones(6, 4)", ValueError, ("weight_redundant", "[6, L", "got [6, 4]")),
    ("weight_redundant=ones(6, 4, 3, 3)", ValueError, ("weight_redundant", "[6, L", "1, 1]", "got [6, 4, 3, 3]")),
    ("weight_redundant=ones(5, 4, 1, 1)", ValueError, ("weight_redundant", "[6, L", "got [5, 4, 1, 1]")),
    ("weight_redundant=ones(6, 5, 1, 1)", ValueError, ("9 channels", "5 redundant", "got 8")),
    (
        "weight_redundant=ones(6, 4, 1, 1, dtype=torch.bfloat16)",
        TypeError,
        ("weight_redundant", "torch.float32", "got torch.bfloat16"),
    ),
    ("weight_redundant=ones(6, 4, 1, 1, device='meta')", ValueError, ("weight_redundant", "cpu", "got meta")),
    ("bias=ones(6).to_sparse()", TypeError, ("bias must be dense", "layout torch.sparse_coo")),
    ("bias=ones(5)", ValueError, ("bias", "[6]", "got [5]")),
    ("bias=ones(1, 6)", ValueError, ("bias", "[6]", "got [1, 6]")),
    ("bias=[0.0, 0.0]", TypeError, ("bias", "torch.Tensor", "got list")),
    ("bias=True", TypeError, ("bias", "torch.Tensor", "got bool")),
    ("bias=ones(6, dtype=torch.float64)", TypeError, ("bias", "torch.float32", "got torch.float64")),
    ("bias=ones(6, device='meta')", ValueError, ("bias", "cpu", "got meta")),
    ("branch_bias=ones(6)", ValueError, ("branch_bias", "[2, 6]", "got [6]")),
    ("branch_bias=ones(6, 2)", ValueError, ("branch_bias", "[2, 6]", "got [6, 2]")),
    ("branch_bias=(ones(6), ones(6))", TypeError, ("branch_bias", "Tensor", "got tuple")),
    ("branch_bias=ones(2, 6, dtype=torch.float64)", TypeError, ("branch_bias", "got torch.float64")),
    ("branch_bias=ones(2, 6, device='meta')", ValueError, ("branch_bias", "got meta")),
]


def input_rows(name: str, channels: int) -> Rows:
    """Mistakes in the activation that a function calls ``name``."""
    dtypes = "float32, bfloat16, float16 or float64"
    return [
        (f"{name}=[1.0]", TypeError, (name, "torch.Tensor", "got list")),
        (f"{name}=None", TypeError, (name, "torch.Tensor", "got NoneType")),
        (f"{name}=ones(2, {channels}, 6, 5, dtype=torch.int64)", TypeError, (name, dtypes, "got torch.int64")),
        (f"{name}=ones(2, {channels}, 6, 5, dtype=torch.bool)", TypeError, (name, dtypes, "got torch.bool")),
        (f"{name}=ones(2, {channels}, 6, 5, dtype=torch.complex64)", TypeError, (name, dtypes, "torch.complex64")),
        (
            f"{name}=ones({channels}, 6, 5)",
            ValueError,
            (name, "4 dimensions [N, C, H, W]", f"got 3: [{channels}, 6, 5]"),
        ),
        (
            f"{name}=ones(1, 2, {channels}, 6, 5)",
            ValueError,
            (name, "4 dimensions [N, C, H, W]", f"got 5: [1, 2, {channels}, 6, 5]"),
        ),
        (
            f"{name}=ones(2, {channels}, 6, 2)",
            ValueError,
            (name, "smaller than the window", "[6, 2]", "kernel_size (3, 3)", "padding (0, 0)"),
        ),
        (
            f"{name}=ones(2, {channels}, 6, 5), dilation=3",
            ValueError,
            (name, "smaller than the window", "[6, 5]", "dilation (3, 3)"),
        ),
        (
            f"{name}=ones(2, {channels}, 0, 5), padding=2",
            ValueError,
            (name, "at least one pixel", f"got [2, {channels}, 0, 5]"),
        ),
    ]


REPRESENTATIVE: Rows = [("x3=ones(2, 5, 6, 5)", ValueError, ("x3", "4 channels of weight_pwc", "got 5"))]

REDUNDANT: Rows = [
    (
        "x1=ones(2, 0, 6, 5), weight_redundant=ones(6, 0, 1, 1)",
        ValueError,
        ("weight_redundant", "at least one output and one input channel", "got [6, 0, 1, 1]"),
    ),
    ("weight_redundant=ones(0, 4, 1, 1)", ValueError, ("at least one output", "got [0, 4, 1, 1]")),
    ("x1=ones(2, 5, 6, 5)", ValueError, ("x1", "4 channels of weight_redundant", "got 5")),
    ("weight_redundant=None", TypeError, ("weight_redundant", "got NoneType")),
    ("weight_redundant=ones(6, 4)", ValueError, ("weight_redundant", "[M, 4, 1, 1]", "[6, 4]")),
    ("weight_redundant=ones(6, 4, 3, 3)", ValueError, ("weight_redundant", "got [6, 4, 3, 3]")),
    ("weight_redundant=ones(6, 4, 1, 1, dtype=torch.float16)", TypeError, ("weight_redundant", "float16")),
    ("weight_redundant=ones(6, 4, 1, 1, device='meta')", ValueError, ("weight_redundant", "device of x1", "got meta")),
    ("kernel_size=(2, 3)", ValueError, ("kernel_size", "odd", "got (2, 3)")),
    ("kernel_size=0", ValueError, ("kernel_size", "at least 1", "got 0")),
    ("kernel_size=3.0", TypeError, ("kernel_size", "a pair of ints", "got 3.0")),
]

FUSION: Rows = [
    ("u3=[1.0]", TypeError, ("u3", "torch.Tensor", "got list")),
    ("u3=ones(3, 4, 5)", ValueError, ("u3", "4 dimensions", "got 3: [3, 4, 5]")),
    ("u3=ones(2, 3, 4, 5, dtype=torch.int32)", TypeError, ("u3", "float32", "got torch.int32")),
    ("u1=None", TypeError, ("u1", "torch.Tensor", "got NoneType")),
    ("u1=ones(2, 3, 4, 4)", ValueError, ("u1", "[2, 3, 4, 5]", "got [2, 3, 4, 4]")),
    ("u1=ones(1, 3, 4, 5)", ValueError, ("u1", "[2, 3, 4, 5]", "got [1, 3, 4, 5]")),
    ("u1=ones(3, 4, 5)", ValueError, ("u1", "[2, 3, 4, 5]", "got [3, 4, 5]")),
    ("u1=ones(2, 3, 4, 5, dtype=torch.float16)", TypeError, ("u1", "torch.float32", "got torch.float16")),
    ("u1=ones(2, 3, 4, 5, device='meta')", ValueError, ("u1", "device of u3, cpu", "got meta")),
    ("u3=ones(2, 3, 0, 5), u1=ones(2, 3, 0, 5)", ValueError, ("u3", "at least one pixel", "got [2, 3, 0, 5]")),
]

CONSTRUCTOR: Rows = [
    ("in_channels=0", ValueError, ("in_channels", "at least 1", "got 0")),
    ("in_channels=8.0", TypeError, ("in_channels", "an int", "got 8.0")),
    ("in_channels=True", TypeError, ("in_channels", "an int", "got True")),
    ("out_channels=-6", ValueError, ("out_channels", "at least 1", "got -6")),
    ("out_channels='6'", TypeError, ("out_channels", "an int", "got '6'")),
    ("kernel_size=2", ValueError, ("kernel_size", "odd", "got 2")),
    ("kernel_size=(3, 4)", ValueError, ("kernel_size", "odd", "got (3, 4)")),
    ("kernel_size=0", ValueError, ("kernel_size", "at least 1", "got 0")),
    ("kernel_size=(3, 3, 3)", ValueError, ("kernel_size", "or a pair of them", "got (3, 3, 3)")),
    ("kernel_size=3.0", TypeError, ("kernel_size", "a pair of ints", "got 3.0")),
    ("kernel_size=True", TypeError, ("kernel_size", "a pair of ints", "got True")),
    ("kernel_size='3'", TypeError, ("kernel_size", "a pair of ints", "got '3'")),
    ("groups=3", ValueError, ("groups=3", "representative channels", "int(8 * 0.5) = 4")),
    ("groups=8", ValueError, ("groups=8", "representative channels", "int(8 * 0.5) = 4")),
    ("groups=4", ValueError, ("groups", "divide out_channels=6", "got groups=4")),
    ("alpha=0", ValueError, ("alpha", "(0, 1]", "got 0")),
    ("alpha=-0.5", ValueError, ("alpha", "(0, 1]", "got -0.5")),
    ("alpha=1.5", ValueError, ("alpha", "(0, 1]", "got 1.5")),
    ("alpha=float('nan')", ValueError, ("alpha", "(0, 1]", "got nan")),
    ("alpha='half'", TypeError, ("alpha", "a number", "got 'half'")),
    ("alpha=True", TypeError, ("alpha", "a number", "got True")),
    ("alpha=None", TypeError, ("alpha", "a number", "got None")),
    ("alpha=0.1", ValueError, ("alpha=0.1", "groups=2", "int(8 * 0.1) = 0")),
    ("alpha=0.375", ValueError, ("alpha=0.375", "groups=2", "int(8 * 0.375) = 3")),
    ("bias='x'", TypeError, ("bias must be True or False, got 'x'",)),
    ("bias=2", TypeError, ("bias must be True or False, got 2",)),
    ("bias=ones(6)", TypeError, ("bias must be True or False, got tensor(",)),
    ("branch_norm='yes'", TypeError, ("branch_norm must be True or False, got 'yes'",)),
    ("padding_mode='mirror'", ValueError, ("padding_mode", "'reflect'", "got 'mirror'")),
    ("padding_mode=None", ValueError, ("padding_mode", "'zeros'", "got None")),
    ("dtype=torch.int32", TypeError, ("dtype", "float32, bfloat16, float16 or float64", "int32")),
    ("dtype=torch.complex64", TypeError, ("dtype", "float32, bfloat16", "complex64")),
    ("dtype=torch.float8_e4m3fn", TypeError, ("dtype", "float32, bfloat16", "float8_e4m3fn")),
]

FORWARD: Rows = [
    ("x=ones(8, 6, 5)", ValueError, ("x must have 4 dimensions", "got 3: [8, 6, 5]")),
    ("x=ones(1, 7, 6, 5)", ValueError, ("x must have 8 channels", "got 7")),
    ("x=ones(1, 8, 6, 5, dtype=torch.float64)", TypeError, ("dtype of x", "float64", "got torch.float32")),
    ("x=ones(1, 8, 2, 5)", ValueError, ("is smaller than the window", "[2, 5]")),
    ("x=None", TypeError, ("x must be a torch.Tensor", "NoneType")),
    ("x=ones(1, 8, 6, 5).to_sparse()", TypeError, ("x must be dense", "got layout torch.sparse_coo")),
    ("x=torch.nested.nested_tensor([x[0], x[1]])", TypeError, ("x must be dense", "got a nested tensor")),
    ("x=ones(1, 8, 6, 5).to_mkldnn()", TypeError, ("x must be dense", "got layout torch._mkldnn")),
]

INFERENCE: Rows = [
    ("bias=ones(5)", ValueError, ("bias", "[6]", "got [5]")),
    ("norm_scale=ones(1, 6)", ValueError, ("norm_scale", "[6]", "got [1, 6]")),
    ("norm_scale=2.0", TypeError, ("norm_scale", "torch.Tensor", "got float")),
    ("residual=ones(2, 6, 6, 5)", ValueError, ("residual", "[2, 6, 4, 3]", "got [2, 6, 6, 5]")),
    ("residual=ones(2, 6, 4, 3, dtype=torch.float16)", TypeError, ("residual", "torch.float32", "got torch.float16")),
    ("activation='gelu'", ValueError, ("activation", "'none', 'relu', 'relu6', 'silu'", "got 'gelu'")),
    ("activation=None", ValueError, ("activation", "'none', 'relu', 'relu6', 'silu'", "got None")),
    ("x=trained", ValueError, ("x must not require gradients", "spconv2d_inference", "torch.no_grad()")),
]

BATCH_NORM: Rows = [
    (
        "x=x3, weight_redundant=ones(6, 0, 1, 1)",
        ValueError,
        ("weight_redundant", "at least one input channel", "no gate"),
    ),
    ("x=ones(1, 8, 3, 3)", ValueError, ("x must", "more than 1 value per channel", "got [1, 8, 3, 3]")),
    ("norm_redundant=(ones(5), None)", ValueError, ("norm_redundant", "[6]", "got [5]")),
    ("norm_redundant=(None, None, None)", TypeError, ("norm_redundant", "a pair of a weight and a bias", "got 3")),
    ("norm_representative=None", TypeError, ("norm_representative", "a pair", "got NoneType")),
    ("norm_representative=ones(2, 6)", TypeError, ("norm_representative", "a pair", "got Tensor")),
    ("eps=1e-5", TypeError, ("eps", "a pair of numbers", "got 1e-05")),
    ("eps=(1e-5, None)", TypeError, ("eps", "a pair of numbers", "got (1e-05, None)")),
    ("eps=(1e-5, -1e-5)", ValueError, ("eps", "at least 0", "got (1e-05, -1e-05)")),
    ("norm_representative=(None, 0.0)", TypeError, ("norm_representative", "torch.Tensor", "got float")),
]
