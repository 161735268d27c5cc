"""See and edit every operation of a PyTorch model.

The model is captured once with ``torch.export``; edits are recorded as data and
compiled in as a graph rewrite.
"""

__version__ = "0.1.0"
