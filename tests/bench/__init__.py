"""What fxsight costs, against the bare module, hooks, torch.compile and nnsight. See docs/benchmarks.md."""
