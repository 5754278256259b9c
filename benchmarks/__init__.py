"""What routing alignment and profiling cost relative to Megatron: `make bench` or `python -m benchmarks`."""
