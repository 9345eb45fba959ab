"""Where the Triton kernels live: forward, quantise, pool and their shared primitives.

Nothing outside this folder imports Triton, so that ``import vidaccel`` works without it.
"""
