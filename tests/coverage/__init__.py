"""Every causal-LM architecture of transformers, small and random, against hooks: ``python -m tests.coverage``."""
