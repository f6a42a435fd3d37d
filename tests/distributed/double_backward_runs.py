"""A gradient penalty on several ranks, for test_double_backward.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed.devices import join
from torch import Tensor, nn

from lightning_fastmoe import MoE
from lightning_fastmoe.distributed import ExpertDataParallel

DATA = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, dispatcher: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 1)
        options = {"load_balancing": 0.0, "z_loss": 0.0, "dispatcher": dispatcher}
        self.moe = MoE(16, 24, 4, top_k=2, **options)  # type: ignore[arg-type]
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return torch.tanh(self.head(h + self.moe(h)))


def penalised(net: Net, x: Tensor) -> Tensor:
    """A loss and the squared norm of its gradient."""
    x = x.clone().requires_grad_()
    loss = net(x).mean()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + 5 * first.square().sum()


def step(dispatcher: str) -> dict[str, Tensor] | str:
    """The weights after a step of SGD; what is refused, as text."""
    join("cpu")
    net = Net(dispatcher)
    parallel = ExpertDataParallel(net, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    try:
        parallel.backward(penalised(net, DATA[dist.get_rank()]))
    except RuntimeError as error:
        return str(error)
    parallel.reduce_gradients()
    optimizer.step()
    whole: dict[str, Tensor] = parallel.full_state_dict()
    return {name: value.clone() for name, value in whole.items()}
