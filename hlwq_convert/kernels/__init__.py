"""The hot loops of encoding and decoding, compiled by numba for the CPU at hand.

They give the same bits as the NumPy functions in rotate, scalar, codebook and quantize, which say what is
computed; these say how it is computed fast. Importing this package takes half a second and compiles nothing.
"""
