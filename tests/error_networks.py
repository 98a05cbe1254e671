"""Mistakes in what is done to layers and networks: whole statements, the exception, and parts of its message.

The names are those of ``error_cases.PREAMBLE``. A row may end with the circumstances under which it is a mistake, a key
of ``error_cases.CIRCUMSTANCES``.
"""

from __future__ import annotations

Row = tuple[str, type[Exception], tuple[str, ...]] | tuple[str, type[Exception], tuple[str, ...], str]
Rows = list[Row]

LAYERS: Rows = [
    ("SPConv2d.from_conv2d(nn.Linear(8, 6))", TypeError, ("conv must be a torch.nn.Conv2d itself", "got Linear")),
    ("SPConv2d.from_conv2d(nn.Conv2d(8, 6, 3, groups=2))", ValueError, ("conv must have groups=1", "got 2")),
    ("FusedSPConv2d(conv)", TypeError, ("layer must be an SPConv2d, got Conv2d",)),
    ("FusedSPConv2d(layer.train())", ValueError, ("layer must be in eval mode, got one in training mode",)),
    ("FusedSPConv2d(layer.eval(), activation='gelu')", ValueError, ("activation", "'silu'", "got 'gelu'")),
    (
        "FusedSPConv2d(layer.eval(), nn.BatchNorm2d(6))",
        ValueError,
        ("norm must be a BatchNorm2d or SyncBatchNorm without hooks", "in training mode"),
    ),
    ("FusedSPConv2d(layer.eval(), in_place='x')", ValueError, ("in_place", "'output', 'residual'", "got 'x'")),
    (
        "FusedSPConv2d(layer.eval(), nn.BatchNorm2d(8).eval())",
        ValueError,
        ("norm must fit the layer, got one that has 8 channels, not 6: BatchNorm2d(8",),
    ),
    (
        "FusedSPConv2d(layer.eval(), nn.BatchNorm2d(6).double().eval())",
        ValueError,
        ("norm must fit the layer, got one that is in torch.float64, the convolution in torch.float32",),
    ),
    (
        "SPConv2d(8, 6, 3, padding=4, padding_mode='reflect')(ones(1, 8, 4, 5))",
        ValueError,
        ("x must have 5 or more pixels along an axis for padding_mode='reflect' and padding (4, 4), got [4, 5]",),
    ),
    (
        "SPConv2d(8, 6, 3, padding=5, padding_mode='circular')(ones(1, 8, 5, 4))",
        ValueError,
        ("x must have 5 or more pixels along an axis for padding_mode='circular'", "got [5, 4]"),
    ),
    (
        "FusedSPConv2d(SPConv2d(8, 6, 3, padding=1, padding_mode='replicate').eval())(ones(1, 8, 0, 5))",
        ValueError,
        ("x must have 1 or more pixels along an axis for padding_mode='replicate'", "got [0, 5]"),
    ),
    ("FusedSPConv2d(layer.eval()).train()", ValueError, ("mode must be False for a fused layer", "got True")),
    ("FusedSPConv2d(layer.eval())(trained)", ValueError, ("x must not require gradients", "before fuse")),
    (
        "torch.fx.symbolic_trace(layer)",
        TypeError,
        ("root must be a network for torch.fx to trace, got SPConv2d alone", "torch.nn.Sequential(layer)"),
    ),
    ("set_recompute(None)", TypeError, ("mode must be True (recompute) or False (keep), got NoneType",)),
    ("set_recompute(0)", TypeError, ("mode must be True", "got int")),
]

DEVICES: Rows = [
    (
        "explain(SPConv2d(8, 6, 3, backend='triton'), x)",
        ValueError,
        ("module must have another backend than 'triton' here: with TRITON_INTERPRET=1 its kernels are not traced",),
        "with TRITON_INTERPRET=1",
    ),
    (
        "functional.spconv2d(x, weight_gwc, weight_pwc, weight_redundant, backend='triton')",
        ValueError,
        ("backend='triton' cannot run here", "on cpu, not on a GPU", "TRITON_INTERPRET=1", "'native'"),
    ),
    (
        "functional.representative_branch(x3.double(), weight_gwc.double(), weight_pwc.double(), backend='triton')",
        ValueError,
        ("backend='triton' cannot run here", "float32, bfloat16 and float16", "torch.float64", "'native'"),
    ),
    (
        "functional.gap_softmax_fusion(u3, u1, backend='triton')",
        ValueError,
        ("backend='triton' cannot run here", "triton is not installed", "'native'"),
        "without triton",
    ),
    ("explain(conv, x)", TypeError, ("module must be an SPConv2d, got Conv2d",)),
    ("explain(layer, [8, 6, 5])", TypeError, ("x must be a torch.Tensor, got list",)),
    ("explain(layer, x, capability=9)", TypeError, ("capability must be a pair of ints such as (9, 0), got 9",)),
    ("explain(layer, x, capability=(9, -1))", ValueError, ("capability", "at least 0", "got (9, -1)")),
    (
        "explain(layer, x, capability=(9, 0))",
        ValueError,
        ("capability must be None here", "built without CUDA", "got (9, 0)"),
        "where PyTorch is built without CUDA",
    ),
    (
        "pixel_arguments(ones(70_000, 8, 181, 181, device='meta'), (181, 181))",
        ValueError,
        ("x must have at most 2147479552 pixels in a batch", "got [70000, 8, 181, 181]"),
    ),
    (
        "check_samples(700_000, 49 * 64, 'x', ones(700_000, 66, 1, 1, device='meta').shape)",
        ValueError,
        ("x must have at most 684783 samples in a batch", "of 3136 numbers each", "got [700000, 66, 1, 1]"),
    ),
    (
        "Path('tuned.json').write_text('{}'); load_tuning('tuned.json')",
        ValueError,
        ("path must be a file written by save_tuning (format 1), got tuned.json: KeyError('format')",),
    ),
    (
        "Path('tuned.json').write_text('{\"format\": 2}'); load_tuning('tuned.json')",
        ValueError,
        ("path must be a file written by save_tuning (format 1)", "format 2"),
    ),
]

CONVERT: Rows = [
    ("convert('resnet20')", TypeError, ("model must be a torch.nn.Module, got str",)),
    ("convert(network, groups=2.0)", TypeError, ("groups must be an int, got 2.0",)),
    ("convert(network, groups=0)", ValueError, ("groups must be at least 1, got 0",)),
    ("convert(network, min_channels=None)", TypeError, ("min_channels must be an int, got None",)),
    ("convert(network, branch_norm='yes')", TypeError, ("branch_norm must be True or False, got 'yes'",)),
    ("convert(network, init='zeros')", ValueError, ("init must be one of 'default', 'dense', got 'zeros'",)),
    ("convert(network, backend='cuda')", ValueError, ("backend must be one of 'auto', 'triton'", "got 'cuda'")),
    ("convert(network, report='yes')", TypeError, ("report must be callable or None, got 'yes'",)),
    ("convert(network, alpha={})", ValueError, ("alpha must be a number or a mapping with at least one pattern",)),
    ("convert(network, alpha={0: 0.5})", TypeError, ("alpha must map patterns", "got the key 0")),
    ("convert(network, alpha='half')", TypeError, ("alpha must be a number, got 'half'",)),
    ("convert(network, alpha={'*': None})", TypeError, ("alpha['*'] must be a number, got None",)),
    ("convert(network, alpha=2)", ValueError, ("alpha must be in (0, 1], got 2",)),
    (
        "convert(network, alpha={'layer1.*': 0.25, '*': 0.5})",
        ValueError,
        ("alpha must have patterns that match convolutions, got 'layer1.*'", "none of the model's 2 ('0', '2')"),
    ),
    (
        "convert(network, alpha={'*': 0.5, '2': 0.25})",
        ValueError,
        ("alpha must have the special patterns before the general ones, got '2'",),
    ),
    ("convert(network, include=2)", TypeError, ("include must be a pattern or several, got 2",)),
    ("convert(network, exclude=[0])", TypeError, ("exclude must be patterns, which are strings, got 0",)),
    ("convert(network, include=[])", ValueError, ("include must be None or at least one pattern, got []",)),
    ("convert(network, exclude='head*')", ValueError, ("exclude must have patterns that match", "got 'head*'")),
    (
        "convert(torch.jit.trace(network, image))",
        ValueError,
        ("model must not be scripted yet, but it is; convert first",),
    ),
    (
        "convert(torch.compile(network))",
        ValueError,
        ("model must not be compiled yet, but it is; use torch.compile(convert(model))",),
    ),
    (
        "convert(DistributedDataParallel(network))",
        ValueError,
        ("must not be wrapped in DistributedDataParallel yet, but it is; convert its .module, then wrap it anew",),
        "in a process group",
    ),
    (
        "convert(fully_shard(network))",
        ValueError,
        ("model must not be sharded by FSDP yet, but it is; convert first",),
        "in a process group",
    ),
]

NETWORKS: Rows = [
    ("summary([network], (1, 3, 9, 9))", TypeError, ("model must be a torch.nn.Module, got list",)),
    ("summary(torch.jit.trace(network, image), (1, 3, 9, 9))", ValueError, ("model must not be scripted",)),
    ("summary(network, (1, 3, -9, 9))", ValueError, ("input_size must be a shape such as", "got (1, 3, -9, 9)")),
    ("fuse(network.state_dict())", TypeError, ("model must be a torch.nn.Module, got OrderedDict",)),
    ("fuse(slim.eval(), plain_norms=1)", TypeError, ("plain_norms must be True or False, got 1",)),
    ("fuse(slim.eval(), report=1)", TypeError, ("report must be callable or None, got 1",)),
    ("fuse(slim.train())", ValueError, ("model must be in eval mode, but it is in training mode",)),
    ("fuse(torch.jit.trace(network, image))", ValueError, ("model must not be scripted yet", "fuse first")),
    ("fuse(torch.compile(slim.eval()))", ValueError, ("model must not be compiled yet", "torch.compile(fuse(model))")),
    (
        "fuse(DistributedDataParallel(slim).eval())",
        ValueError,
        ("model must not be wrapped in DistributedDataParallel yet, but it is; fuse its .module, then wrap it anew",),
        "in a process group",
    ),
    (
        "fuse(nn.Sequential(fully_shard(slim)).eval())",
        ValueError,
        ("model must not be sharded by FSDP yet, but its 0 is; fuse first",),
        "in a process group",
    ),
    ("models.legal_alpha(16, 1.5)", ValueError, ("alpha must be in (0, 1], got 1.5",)),
    ("models.legal_alpha(16, '1/2')", TypeError, ("alpha must be a number, got '1/2'",)),
    ("models.legal_alpha('16', 0.5)", TypeError, ("in_channels must be an int, got '16'",)),
    ("models.legal_alpha(16, 0.5, groups=0)", ValueError, ("groups must be at least 1, got 0",)),
    ("models.legal_alpha(2, 0.5, groups=4)", ValueError, ("groups must be between 1 and in_channels=2, got 4",)),
    ("models.resnet20(alpha=0.0)", ValueError, ("alpha must be in (0, 1], got 0.0",)),
    ("models.resnet20('1/2')", TypeError, ("alpha must be a number, got '1/2'",)),
    ("models.resnet50('1/2')", TypeError, ("alpha must be a number, got '1/2'",)),
    ("models.vgg16(0.5, groups='2')", TypeError, ("groups must be an int, got '2'",)),
    ("load_reference_checkpoint({}, {})", TypeError, ("model must be a torch.nn.Module, got dict",)),
    (
        "load_reference_checkpoint(normed, {'gwc.weight': ones(6, 4, 3, 3), 'fc.weight': ones(10, 6)})",
        ValueError,
        (
            "checkpoint must have the parameters of this SPConv2d, got",
            "no weight_pwc, [6, 4, 1, 1]",
            "fc.weight, which it has no place for",
            "gwc.weight as [6, 4, 3, 3] instead of [6, 2, 3, 3]",
        ),
    ),
    (
        "load_reference_checkpoint(normed, 3)",
        TypeError,
        ("checkpoint must be a path or a mapping of names to tensors, got int",),
    ),
    (
        "torch.save([1, 2], 'model.pth'); load_reference_checkpoint(normed, 'model.pth')",
        ValueError,
        ("checkpoint must be a path or a mapping of names to tensors, got list",),
    ),
    (
        "load_reference_checkpoint(normed, {'pwc.weight': weight_pwc.to_sparse()})",
        ValueError,
        ("checkpoint must have tensors that can be copied into parameters, got pwc.weight, of layout",),
    ),
    (
        "load_reference_checkpoint(normed, {'pwc.weight': weight_pwc * 1j})",
        ValueError,
        ("can be copied into parameters, got pwc.weight, of torch.complex64",),
    ),
    (
        "load_reference_checkpoint(normed, {'pwc.weight': weight_pwc.to('meta')})",
        ValueError,
        ("can be copied into parameters, got pwc.weight, on the meta device, where there are no values",),
    ),
    (
        "load_reference_checkpoint(normed, {'epoch': 3, 'gwc.weight': weight_gwc})",
        ValueError,
        ("checkpoint must be a mapping of names to tensors, got epoch (int)",),
    ),
    (
        "torch.save(conv, 'model.pth'); load_reference_checkpoint(normed, 'model.pth')",
        ValueError,
        ("checkpoint must be readable with weights_only=True, got 'model.pth': ",),
    ),
]
