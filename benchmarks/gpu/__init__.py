"""The GPU verification kit: ``python -m benchmarks.gpu``, or ``make gpu``.

One command checks the kernels on the GPU that is there, times them against cuDNN, and writes a JSON and a Markdown
file. A section is a process of its own (:mod:`benchmarks.gpu.child`), so that neither a hang nor an illegal address
takes the others down, and what it has found until then is kept.
"""
