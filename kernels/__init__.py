"""Triton kernels. They know pointers, strides and blocks; nothing of modules, autograd or operators.

Tensors are channels_last in memory, so a pixel's channels lie next to each other; the comments write [N, H, W, C].
"""
