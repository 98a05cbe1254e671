"""Training and the demo, behind ``python -m spconv_triton``. Nothing else in the package imports this."""
