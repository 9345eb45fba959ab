"""Linear layers of the transformer blocks in 8 bits, computed by torchao: which, on which devices, and the undo."""
