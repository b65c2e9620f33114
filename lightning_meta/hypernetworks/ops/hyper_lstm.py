"""The custom operator behind HyperLSTMCell.sequence, and its gradients. Letters as in ``layers.py``.

Autograd would keep a graph of about sixty operations per step and add to every weight's gradient at every step. Here a
step keeps only what its gradients need. The weights' gradients are one matmul each after the loop, except for those of
the scale weights, whose inputs would need more memory than all the rest. Each gate of a step is contiguous in memory.
Most views are created before the loop, because creating one takes as long as a small operation.

If the sequence is large and hyper_lstm.cpp can be built, a step is a single pass over memory apart from its large
matmuls. Otherwise _step and _step_backward compute the same.

Tensors are packed as (N, ...): step t owns n_t consecutive rows. A step reads and writes only the first n_t rows of a
state. The other samples have ended (or, in reverse, have not yet begun), and their state stays as it is.

Here z has one more number, always 1: see HyperLSTMCell._fast_sequence.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_meta.hypernetworks.ops import hyper_lstm_native

EPSILON = 1e-3  # of every layer norm; from the authors' code
WORTH_BUILDING = 2**16  # use the C++ steps if N * H is at least this


class _Kept(NamedTuple):
    """What a network keeps for its gradients: (N, ...) in all, or (n, units) or (gates, n, units) of one step."""

    h: Tensor  # before the step
    c: Tensor  # before the step
    gates: Tensor  # after their nonlinearities
    tanh_c: Tensor
    normal: Tensor  # gates and c, normalised
    rstd: Tensor  # 1 / their standard deviation

    @classmethod
    def empty(cls, rows: int, H: int, normed: bool, like: Tensor) -> "_Kept":
        sizes = (H, H, 4 * H, H, 5 * H * normed, 5 * normed)
        return cls(*(like.new_empty(rows, size) for size in sizes))

    def steps(self, batch_sizes: list[int]) -> "list[_Kept]":
        slabs = [
            [
                step.view(gates, len(step), slab.shape[1] // gates) if gates else step
                for step in _steps(slab, batch_sizes)
            ]
            for slab, gates in zip(self, (0, 0, 4, 0, 5, 5), strict=True)
        ]
        return [_Kept(*step) for step in zip(*slabs, strict=True)]


def _steps(slab: Tensor | None, batch_sizes: list[int], dim: int = 0) -> Sequence[Any]:
    """Split a tensor into the rows of each step. If it has too few rows for all steps, they share the first ones."""
    if slab is None:
        return [None] * len(batch_sizes)
    if slab.shape[dim] == sum(batch_sizes):
        return slab.split(batch_sizes, dim)
    return [slab.narrow(dim, 0, n) for n in batch_sizes]


def _by_gate(x: Tensor, H: int) -> Tensor:
    """View the first columns of (N, 4H + ...) as (4, N, H)."""
    return x[:, : 4 * H].unflatten(1, (4, H)).transpose(0, 1)


def _by_network(x: Tensor, H: int, S: int) -> tuple[Tensor, Tensor]:
    """View (N, 4H + 4S) as (4, N, H) and (4, N, S)."""
    return _by_gate(x, H), _by_gate(x[:, 4 * H :], S)


def _by_scale(z: Tensor, Z: int) -> Tensor:
    """View (N, 12 Z) as (12, N, Z)."""
    return z.unflatten(1, (12, Z)).transpose(0, 1)


def _normalise(x: Tensor, norm: Tensor, normal: Tensor, rstd: Tensor) -> None:
    """Apply layer norm to gates (gates, n, H) in place; gains and biases are norm (2, gates, 1, H)."""
    found, _, r = torch.native_layer_norm(x, x.shape[2:], None, None, EPSILON)
    rstd.copy_(r)
    torch.addcmul(norm[1], normal.copy_(found), norm[0], out=x)


def _normalise_backward(grad: Tensor, norm: Tensor, grad_norm: Tensor, normal: Tensor, rstd: Tensor) -> None:
    """Turn the gradient of the layer norm's result into that of its input, in place. Add to grad_norm."""
    grad_norm[0] += (grad * normal).sum(1, keepdim=True)
    grad_norm[1] += grad.sum(1, keepdim=True)
    grad *= norm[0]
    statistics = torch.zeros_like(rstd), torch.ones_like(rstd)  # mean and 1 / deviation of ``normal``
    options = None, None, [True, False, False]
    found = torch.ops.aten.native_layer_norm_backward(grad, normal, grad.shape[2:], *statistics, *options)[0]
    torch.mul(found, rstd, out=grad)


def _update(kept: _Kept, c: Tensor, norm: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the next h. Replaces the gates' sums in ``kept.gates`` by the gates, and c by the next c, in place."""
    if norm is not None:
        _normalise(kept.gates, norm[:, :4], kept.normal[:4], kept.rstd[:4])
    i, f, g, o = kept.gates.unbind()
    kept.gates[:2].sigmoid_(), o.sigmoid_(), g.tanh_()
    c.mul_(f).addcmul_(i if mask is None else i * mask, g)
    if norm is None:
        torch.tanh(c, out=kept.tanh_c)
    else:
        kept.tanh_c.copy_(c)
        _normalise(kept.tanh_c[None], norm[:, 4:], kept.normal[4:], kept.rstd[4:])
        kept.tanh_c.tanh_()
    return o * kept.tanh_c


def _update_backward(
    kept: _Kept,
    grad_h: Tensor,
    grad_c: Tensor,
    norm: Tensor | None,
    grad_norm: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
) -> None:
    """Write the gradients of the gates' sums to out (4, n, H), update that of c in place, add to grad_norm."""
    i, f, g, o = kept.gates.unbind()
    to_c = torch.ops.aten.tanh_backward(grad_h * o, kept.tanh_c)
    if norm is not None and grad_norm is not None:
        _normalise_backward(to_c[None], norm[:, 4:], grad_norm[:, 4:], kept.normal[4:], kept.rstd[4:])
    grad_c += to_c
    masked = grad_c if mask is None else grad_c * mask
    to_i, to_f, to_g, to_o = out.unbind()
    for to, a, b in ((to_i, masked, g), (to_f, grad_c, kept.c), (to_g, masked, i), (to_o, grad_h, kept.tanh_c)):
        torch.mul(a, b, out=to)
    for to, gates in ((out[:2], kept.gates[:2]), (to_o, o)):
        torch.ops.aten.sigmoid_backward.grad_input(to, gates, grad_input=to)
    torch.ops.aten.tanh_backward.grad_input(to_g, g, grad_input=to_g)
    grad_c *= f
    if norm is not None and grad_norm is not None:
        _normalise_backward(out, norm[:, :4], grad_norm[:, :4], kept.normal[:4], kept.rstd[:4])


def _step(
    kept: _Kept,
    x: Tensor,
    products: Tensor,
    z: Tensor,
    scale: Tensor | None,
    norm: Tensor | None,
    mask: Tensor | None,
    h: Tensor,
    c: Tensor,
    out: Tensor,
) -> None:
    """Run a step of one network, given its matmuls.

    Args:
        kept: Receives what the gradients need.
        x: Product of the input weights and x, (4, n, H).
        products: Product of the weights and the main network's previous h, (4, n, H).
        z: (n, 12 Z); in the small network the product with its own previous h, plus bias, (n, 4H).
        scale: (12, Z, H); None in the small network.
        norm: Gains and biases (2, 5, 1, H); None without layer norm.
        mask: Dropout's factors (n, H), or None.
        h: State (n, H), updated in place.
        c: State (n, H), updated in place.
        out: Receives a copy of the new h.
    """
    kept.h.copy_(h)
    kept.c.copy_(c)
    if scale is None:
        torch.add(_by_gate(z, h.shape[1]), x, out=kept.gates).add_(products)
    else:
        d_h, d_x, b = torch.bmm(_by_scale(z, scale.shape[1]), scale).unflatten(0, (3, 4))
        torch.addcmul(b, d_h, products, out=kept.gates).addcmul_(d_x, x)
    h.copy_(_update(kept, c, norm, mask))
    out.copy_(h)


def _step_backward(
    kept: _Kept,
    x: Tensor,
    products: Tensor,
    z: Tensor | None,
    scale: Tensor | None,
    norm: Tensor | None,
    mask: Tensor | None,
    h: Tensor,
    c: Tensor,
    out: Tensor | None,
    to_x: Tensor,
    to_products: Tensor,
    to_z: Tensor,
    grad_norm: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """Compute the gradients of a step from those of h, c and out, which replace h, c and out in ``_step``.

    Writes to_x, to_products, to_z and c, and adds to grad_norm and grad_scale. Those two have one slice per thread;
    this form uses the first. The caller computes the gradient of h.
    """
    if out is not None:
        h += out
    if grad_norm is not None:
        grad_norm = grad_norm[0]
    if scale is None or z is None or grad_scale is None:  # the small network has none of them
        to_sums = torch.empty_like(kept.gates)
        _update_backward(kept, h, c, norm, grad_norm, mask, out=to_sums)
        for to in (_by_gate(to_z, h.shape[1]), to_x, to_products):
            to.copy_(to_sums)
        return
    z, to_z = (_by_scale(t, scale.shape[1]) for t in (z, to_z))
    to_d = scale.new_empty(12, *h.shape)
    to_d_h, to_d_x, to_b = to_d.unflatten(0, (3, 4))
    _update_backward(kept, h, c, norm, grad_norm, mask, out=to_b)
    d_h, d_x = torch.bmm(z[:8], scale[:8]).unflatten(0, (2, 4))
    for to, a in ((to_products, d_h), (to_x, d_x), (to_d_h, products), (to_d_x, x)):
        torch.mul(to_b, a, out=to)
    to_z.copy_(torch.bmm(to_d, scale.mT))
    grad_scale[0].baddbmm_(z.mT, to_d)


def _forms(projected: Tensor, scale: Tensor) -> tuple[Callable[..., None], Callable[..., None], int]:
    """Return the functions for a forward and a backward step, and their number of threads.

    Chosen by size and machine only, so a resumed run uses the same code. Small inputs never trigger compilation.
    """
    large = projected.shape[0] * scale.shape[2] >= WORTH_BUILDING
    return (hyper_lstm_native.steps(scale, projected.dtype) if large else None) or (_step, _step_backward, 1)


@torch.library.custom_op("lightning_meta::hyper_lstm", mutates_args=())
def hyper_lstm(
    projected: Tensor,
    weight_h: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    mask: Tensor | None,
    hyper_mask: Tensor | None,
    state: list[Tensor],
    batch_sizes: list[int],
    reverse: bool,
    embed_previous: bool,
    keep: bool,
) -> list[Tensor]:
    """Run one layer in one direction.

    Args:
        projected: Products of both networks' input weights and x, (N, 4H + 4S).
        weight_h: Both networks' weights for h, (4H + 4S, H), in the dtype of ``projected``.
        weights: The small network's weight (4S, S) and bias (4S); weight (12 Z, S) and bias (12 Z) of z; scale weights
            (12, Z, H). The 12 are d_h of all gates, d_x of all gates, b of all gates.
        norms: Empty, or gains and biases of the gates and of c: (2, 5, 1, H) and (2, 5, 1, S).
        mask: Dropout's factors (N, H), or None.
        hyper_mask: The same for the small network, (N, S).
        state: h, hyper_h, c, hyper_c.
        batch_sizes: Number of samples at each step.
        reverse: Run from the last step to the first.
        embed_previous: Compute z from hyper_h before the step.
        keep: Keep what the gradients need.

    Returns:
        Outputs (N, H), the four parts of the last state, and what is kept for the gradients.
    """
    hyper_weight, hyper_bias, embed_weight, embed_bias, scale = weights
    H, S = scale.shape[2], hyper_weight.shape[1]
    norm, hyper_norm = norms or (None, None)
    step, _, _ = _forms(projected, scale)
    state = [part.clone(memory_format=torch.contiguous_format) for part in state]
    output, main, hyper, z_kept, hyper_kept, with_h = _new_results(projected, weights, norms, batch_sizes, keep)
    weight_h, hyper_weight, embed_weight = weight_h.t(), hyper_weight.t(), embed_weight.t()
    if len(batch_sizes) > 8:  # then a contiguous copy pays off
        weight_h = weight_h.contiguous()
    states = {n: [part[:n] for part in state] for n in set(batch_sizes)}
    by_row = with_h, z_kept, hyper_kept, output, mask, hyper_mask
    steps = zip(
        main.steps(batch_sizes),
        hyper.steps(batch_sizes),
        *(_steps(slab, batch_sizes) for slab in by_row),
        *(_steps(slab, batch_sizes, 1) for t in (projected, with_h) for slab in _by_network(t, H, S)),
        strict=True,
    )
    with torch.autocast(projected.device.type, enabled=False):
        for m, s, *rows, x, hyper_x, products, hyper_products in list(steps)[:: -1 if reverse else 1]:
            all_products, z, new, out, keep, hyper_keep = rows
            h, hyper_h, c, hyper_c = states[len(out)]
            torch.mm(h.to(all_products.dtype), weight_h, out=all_products)
            sums = torch.addmm(hyper_bias, hyper_h, hyper_weight)
            step(s, hyper_x, hyper_products, sums, None, hyper_norm, hyper_keep, hyper_h, hyper_c, new)
            torch.addmm(embed_bias, s.h if embed_previous else new, embed_weight, out=z)
            step(m, x, products, z, scale, norm, keep, h, c, out)
    return [output, *state, *main, *hyper, z_kept, hyper_kept, with_h]


def _new_results(
    projected: Tensor, weights: list[Tensor], norms: list[Tensor], batch_sizes: list[int], keep: bool
) -> tuple[Tensor, _Kept, _Kept, Tensor, Tensor, Tensor]:
    """Allocate outputs, what both networks keep, z, the small network's new h, and both networks' products with h."""
    hyper_weight, _, _, embed_bias, scale = weights
    N, H, S = projected.shape[0], scale.shape[2], hyper_weight.shape[1]
    rows = N if keep else max(batch_sizes)
    main, hyper = (_Kept.empty(rows, units, bool(norms), scale) for units in (H, S))
    z, hyper_h = (scale.new_empty(rows, size) for size in (embed_bias.shape[0], S))
    return scale.new_empty(N, H), main, hyper, z, hyper_h, projected.new_empty(rows, projected.shape[1])


@torch.library.custom_op("lightning_meta::hyper_lstm_backward", mutates_args=())
def hyper_lstm_backward(
    grad_output: Tensor,
    grad_state: list[Tensor],
    projected: Tensor,
    weight_h: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    mask: Tensor | None,
    hyper_mask: Tensor | None,
    kept: list[Tensor],
    batch_sizes: list[int],
    reverse: bool,
    embed_previous: bool,
) -> list[Tensor]:
    """Return the gradients of ``projected``, ``weight_h``, ``weights``, ``norms`` and ``state``, in this order."""
    hyper_weight, _, embed_weight, _, scale = weights
    H, S = scale.shape[2], hyper_weight.shape[1]
    main, hyper, (z_kept, hyper_kept, with_h) = _Kept(*kept[:6]), _Kept(*kept[6:12]), kept[12:]
    _, step_backward, parts = _forms(projected, scale)
    grad_output = grad_output.contiguous()
    grad_state = [grad.clone(memory_format=torch.contiguous_format) for grad in grad_state]
    grad_scale, *grad_norms = (t.new_zeros(parts, *t.shape) for t in (scale, *norms))
    (norm, hyper_norm), (grad_norm, grad_hyper_norm) = norms or (None, None), grad_norms or (None, None)
    grad_projected, grad_with_h, grad_z = (torch.empty_like(t) for t in (projected, with_h, z_kept))
    grad_sums = scale.new_empty(len(projected), 4 * S)
    states = {n: [part[:n] for part in grad_state] for n in set(batch_sizes)}
    by_row = z_kept, grad_with_h, grad_z, grad_sums, grad_output, mask, hyper_mask
    by_gate = projected, with_h, grad_projected, grad_with_h
    steps = zip(
        main.steps(batch_sizes),
        hyper.steps(batch_sizes),
        *(_steps(slab, batch_sizes) for slab in by_row),
        *(_steps(slab, batch_sizes, 1) for t in by_gate for slab in _by_network(t, H, S)),
        strict=True,
    )
    with torch.autocast(projected.device.type, enabled=False):
        for m, s, z, to_all_products, to_z, to_sums, to_out, keep, hyper_keep, *views in list(steps)[
            :: 1 if reverse else -1
        ]:
            x, hyper_x, products, hyper_products, to_x, to_hyper_x, to_products, to_hyper_products = views
            h, hyper_h, c, hyper_c = states[len(to_out)]  # their gradients
            shared: tuple[Any, ...] = m, x, products, z, scale, norm, keep, h, c, to_out
            step_backward(*shared, to_x, to_products, to_z, grad_norm, grad_scale)
            through_z = to_z @ embed_weight
            if not embed_previous:
                hyper_h += through_z
            shared = s, hyper_x, hyper_products, None, None, hyper_norm, hyper_keep, hyper_h, hyper_c, None
            step_backward(*shared, to_hyper_x, to_hyper_products, to_sums, grad_hyper_norm, None)
            torch.mm(to_sums, hyper_weight, out=hyper_h)
            if embed_previous:
                hyper_h += through_z
            h.copy_(to_all_products @ weight_h)
        return [
            grad_projected,
            grad_with_h.t() @ main.h.to(grad_with_h.dtype),
            grad_sums.t() @ hyper.h,
            grad_sums.sum(0),
            grad_z.t() @ (hyper.h if embed_previous else hyper_kept),
            grad_z.sum(0),
            grad_scale.sum(0),
            *(grad.sum(0) for grad in grad_norms),
            *grad_state,
        ]


@hyper_lstm.register_fake
def _(
    projected: Tensor,
    weight_h: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    mask: Tensor | None,
    hyper_mask: Tensor | None,
    state: list[Tensor],
    batch_sizes: list[int],
    reverse: bool,
    embed_previous: bool,
    keep: bool,
) -> list[Tensor]:
    output, main, hyper, *rest = _new_results(projected, weights, norms, batch_sizes, keep)
    return [output, *(torch.empty_like(part) for part in state), *main, *hyper, *rest]


@hyper_lstm_backward.register_fake
def _(
    grad_output: Tensor,
    grad_state: list[Tensor],
    projected: Tensor,
    weight_h: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    *_: Any,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (projected, weight_h, *weights, *norms, *grad_state)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    projected, weight_h, weights, norms, mask, hyper_mask, state, *ctx.options, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[5:])
    ctx.norms = len(norms)
    ctx.save_for_backward(projected, weight_h, mask, hyper_mask, *state, *weights, *norms, *output[5:])


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    projected, weight_h, mask, hyper_mask, *rest = ctx.saved_tensors
    state, weights, norms, kept = rest[:4], rest[4:9], rest[9 : 9 + ctx.norms], rest[9 + ctx.norms :]
    # Outputs that the loss does not depend on have gradient None.
    grad_state = [torch.zeros_like(s) if grad is None else grad for s, grad in zip(state, grads[1:5], strict=True)]
    grad_output = grads[0]
    if grad_output is None:
        grad_output = state[0].new_zeros(projected.shape[0], state[0].shape[1])
    found = hyper_lstm_backward(
        grad_output, grad_state, projected, weight_h, weights, norms, mask, hyper_mask, kept, *ctx.options
    )
    return found[0], found[1], found[2:7], found[7:-4], None, None, found[-4:], None, None, None, None


hyper_lstm.register_autograd(_gradients, setup_context=_keep)
