"""What routing alignment and profiling cost beside stock Megatron: `make bench`, or `python -m benchmarks`."""
