"""Expert parallelism for a training loop of your own, in plain PyTorch."""

from lightning_fastmoe.distributed.data_parallel.wrapper import ExpertDataParallel

__all__ = ["ExpertDataParallel"]
