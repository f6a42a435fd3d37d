"""The operators of csrc that make up a layer, one row after the other, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fastmoe.ops.activation import apply_activation


class SlowProducts:
    """What csrc/hopper computes."""

    @staticmethod
    def _experts(offsets: Tensor, rows: int) -> list[int]:
        return torch.searchsorted(offsets.long(), torch.arange(rows), right=True).tolist()

    def hopper_up_forward(self, x, order, top_k, offsets, up, bias, activation, keep_h):
        experts = self._experts(offsets, len(order))
        rows = x[order // top_k]
        h = torch.stack([up[e] @ row for e, row in zip(experts, rows, strict=True)])
        if bias is not None:
            h = h + bias[experts]
        return (h if keep_h else h.new_empty(0, h.shape[1])), apply_activation(h, activation)

    def hopper_rows_product(self, rows, offsets, weight, transposed, order=None, weights=None):
        assert order is None
        assert weights is None
        experts = self._experts(offsets, len(rows))
        matrices = weight.transpose(1, 2) if transposed else weight
        return torch.stack([row @ matrices[e] for e, row in zip(experts, rows, strict=True)])

    def hopper_backward_activation_(self, grad, order, offsets, down, h, weights, activation):
        top_k = weights.shape[1]
        d_act = self.hopper_rows_product(grad[order // top_k], offsets, down, False)
        w = weights.reshape(-1)[order].unsqueeze(1)
        with torch.enable_grad():
            leaf = h.clone().requires_grad_()
            act = apply_activation(leaf, activation)
            (d_h,) = torch.autograd.grad(act, leaf, w * d_act)
        act = act.detach()
        h.copy_(d_h)
        d_weights = torch.empty_like(weights).reshape(-1)
        d_weights[order] = (act * d_act).sum(1).to(weights.dtype)
        return w * act, d_weights.view_as(weights)

    def hopper_weight_gradient(self, gathered, order, top_k, rows, offsets, transposed):
        out = rows.new_zeros(len(offsets), gathered.shape[1], rows.shape[1])
        for r, e in enumerate(self._experts(offsets, len(rows))):
            out[e] += torch.outer(gathered[order[r] // top_k], rows[r])
        return out.transpose(1, 2).contiguous() if transposed else out


class SlowRouterProducts:
    """What csrc/hopper/router_product.cu computes."""

    def hopper_bf16_parts(self, x, parts):
        found, rest = [], x
        for _ in range(3):
            found.insert(0, rest.bfloat16())
            rest = rest - found[0].to(x.dtype)
        chosen = {2: found[1:], 3: found, 4: [*found, found[2]]}[parts]
        return torch.nn.functional.pad(torch.stack(chosen, 1), (0, -x.shape[1] % 8))

    def hopper_router_logits(self, x, weight):
        return (x.double() @ weight.double().sum(1).T).float()

    def hopper_router_weight_gradient(self, x, gradient, parts, experts, in_bf16):
        whole = gradient[:, :parts, :experts].double().sum(1)
        found = (whole.T @ x.double()).float()
        return found.bfloat16() if in_bf16 else found


class SlowOperators(SlowProducts):
    """What csrc/layer.cpp computes."""

    def expert_layer(self, x, weights, up, down, order, inverse, offsets, name, keep_h, on_hopper):
        assert (weights is None) == (order is None) == (inverse is None)
        top_k = 1 if weights is None else weights.shape[1]
        pairs = torch.arange(len(x)) if order is None else order
        h, a = self.hopper_up_forward(x, pairs, top_k, offsets, up, None, name, keep_h)
        y = self.hopper_rows_product(a, offsets, down, True)
        if inverse is not None:
            y = self._sum(y, inverse, weights)
        return y, h

    @staticmethod
    def _sum(rows, inverse, weights):
        out = rows.new_zeros(len(weights), rows.shape[1])
        for pair, row in enumerate(inverse.tolist()):
            if row >= 0:
                out[pair // weights.shape[1]] += weights.reshape(-1)[pair] * rows[row]
        return out

    def expert_layer_backward_(
        self,
        grad,
        x,
        h,
        weights,
        up,
        down,
        order,
        inverse,
        tokens_per_expert,
        offsets,
        name,
        wants_x,
        wants_up,
        wants_down,
        on_hopper,
        keep_h,
    ):
        assert grad.is_contiguous()
        assert weights.numel() >= len(h)
        pairs, top_k = torch.arange(len(x)) if order is None else order, weights.shape[1]
        h = h.clone() if keep_h else h
        args = (grad, pairs, offsets, down, h, weights, name)
        weighted, d_weights = self.hopper_backward_activation_(*args)
        d_x = d_up = d_down = x.new_empty(0)
        if wants_down:
            d_down = self.hopper_weight_gradient(grad, pairs, top_k, weighted, offsets, False)
        if wants_x:
            d_x = self.hopper_rows_product(h, offsets, up, False)
            if inverse is not None:
                d_x = self._sum(d_x, inverse, torch.ones_like(weights))
        if wants_up:
            d_up = self.hopper_weight_gradient(x, pairs, top_k, h, offsets, True)
        return d_x, d_weights, d_up, d_down
