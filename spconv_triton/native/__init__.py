"""SPConv on ATen: the path of CPUs, of float64, and of GPUs without triton.

``onepass`` is the whole layer, forward; ``backward`` its gradients, by one of three ways (``backward_maps``,
``backward_merged``, ``backward_products``); ``batch_norm`` the layer with batch norms in its branches, in training.
``branches`` is the layer part by part, which autograd, ``torch.func`` and compilers take apart, ``traced`` what of that
is for ``torch.compile`` alone. ``inference`` is what a layer remembers between calls, ``weights`` what it makes of its
weights.

All of them stand on ``convolution``, ``convolution_backward`` and ``products`` (oneDNN's and MKL's, with their defects
and preferences), ``folding`` (weights of one convolution that does the work of two), ``gate`` and ``parts``.
"""
