"""Parts of benchmarks/offload.py and benchmarks/offload_gpus.py."""
