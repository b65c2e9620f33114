"""The operator behind HyperLSTMCell, and its gradients. Letters as in ``layers.py``.

Autograd would keep a graph of some sixty operations a step, and add to every weight's gradient at every step. Here a
step keeps only what its gradients need, and weights' gradients are one product after the loop; but for the scales',
since what they are made of is larger than all the rest together. Each gate of a step is contiguous memory. Views are
made before the loop where that is simple, since one costs as much as a small operation.

Where the sequence is large and hyper_lstm.cpp can be built, a step is one pass over memory, but for its large
products; elsewhere it is _step and _step_backward, which say the same.

Step t is some n rows of every (N, ...) tensor. A sample's state stays where it is once its sequence is over, or until
it starts in reverse: a step touches the first n rows of a state alone.

From here on z has one number more, always 1: see HyperLSTMCell.sequence.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_meta.hypernetworks.ops import hyper_lstm_native

EPSILON = 1e-3  # of every layer norm; from the authors' code
WORTH_BUILDING = 2**16  # N * H from which on a HyperLSTM's steps are compiled


class _Kept(NamedTuple):
    """What a network keeps for its gradients: (N, ...), or of one step (n, units), by gate where there are several."""

    h: Tensor  # before the step
    c: Tensor  # before the step
    gates: Tensor  # after their nonlinearities
    tanh_c: Tensor
    normal: Tensor  # gates and c, normalised
    rstd: Tensor  # by what

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
    """Each step's rows, or None for each step. A slab that is too small for all steps serves each in turn."""
    if slab is None:
        return [None] * len(batch_sizes)
    if slab.shape[dim] == sum(batch_sizes):
        return slab.split(batch_sizes, dim)
    return [slab.narrow(dim, 0, n) for n in batch_sizes]


def _by_gate(x: Tensor, H: int) -> Tensor:
    """(4, N, H) view of the first columns of (N, 4H + ...)."""
    return x[:, : 4 * H].unflatten(1, (4, H)).transpose(0, 1)


def _by_network(x: Tensor, H: int, S: int) -> tuple[Tensor, Tensor]:
    """(4, N, H) and (4, N, S) views of (N, 4H + 4S)."""
    return _by_gate(x, H), _by_gate(x[:, 4 * H :], S)


def _by_scale(z: Tensor, Z: int) -> Tensor:
    """(12, N, Z) view of (N, 12 Z)."""
    return z.unflatten(1, (12, Z)).transpose(0, 1)


def _normalise(x: Tensor, norm: Tensor, normal: Tensor, rstd: Tensor) -> None:
    """Layer norm of gates (gates, n, H), in place; norm (2, gates, 1, H)."""
    found, _, r = torch.native_layer_norm(x, x.shape[2:], None, None, EPSILON)
    rstd.copy_(r)
    torch.addcmul(norm[1], normal.copy_(found), norm[0], out=x)


def _normalise_backward(grad: Tensor, norm: Tensor, grad_norm: Tensor, normal: Tensor, rstd: Tensor) -> None:
    """Gradients of what was normalised from those of the result, in place. Adds to grad_norm."""
    grad_norm[0] += (grad * normal).sum(1, keepdim=True)
    grad_norm[1] += grad.sum(1, keepdim=True)
    grad *= norm[0]
    as_they_are = torch.zeros_like(rstd), torch.ones_like(rstd)  # mean and 1 / deviation of what is normal
    options = None, None, [True, False, False]
    found = torch.ops.aten.native_layer_norm_backward(grad, normal, grad.shape[2:], *as_they_are, *options)[0]
    torch.mul(found, rstd, out=grad)


def _update(kept: _Kept, c: Tensor, norm: Tensor | None, mask: Tensor | None) -> Tensor:
    """The next h from the gates' sums, in ``kept.gates``; gates and c in place."""
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
    """Gradients of the gates' sums into out (4, n, H), of c in place. Adds to grad_norm."""
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
    """A step of one network, but for its products.

    Args:
        kept: Where to keep what the gradients need.
        x: The product with x, (4, n, H).
        products: The product with the main network's h before the step, (4, n, H).
        z: (n, 12 Z); of the small network its own sums, (n, 4H).
        scale: (12, Z, H); None in the small network.
        norm: None, or (2, 5, 1, H).
        mask: None, or (n, H).
        h: State (n, H), brought forward in place.
        c: State (n, H), brought forward in place.
        out: Where h goes, too.
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
    """Gradients of a step, from those of h, c and out: writes to_x, to_products, to_z and c, adds to the last two.

    These two have one slab for each part of the samples, of which this form uses the first. h's is left to the caller.
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
    """What does a step, forward and backward, and into how many parts the samples are split.

    A matter of size and machine alone, so that a run that is taken up computes as before; and what is small waits for
    no compiler.
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
        projected: (N, 4H + 4S), both networks' products with x.
        weight_h: (4H + 4S, H), in the dtype of ``projected``, in which those two products run.
        weights: of the small network (4S, S) and (4S); to z (12 Z, S) and (12 Z); scale (12, Z, H). The 12 are d_h of
            all gates, d_x of all gates, b of all gates.
        norms: None or two, (2, 5, 1, H) and (2, 5, 1, S): gain and bias of the gates and c.
        mask: (N, H).
        hyper_mask: (N, S).
        state: h, hyper_h, c, hyper_c.
        batch_sizes: Of the packed sequence.
        reverse: Whether the last step comes first.
        embed_previous: Whether z is made from hyper_h before the step.
        keep: Whether gradients will be asked for.

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
    if len(batch_sizes) > 8:  # then laying it out for the products pays
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
    """Memory for outputs, what both networks keep, z, the small network's new h, and both networks' products with h."""
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
    """Gradients of ``projected``, ``weight_h``, ``weights``, ``norms`` and ``state``, in this order."""
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
            ours: tuple[Any, ...] = m, x, products, z, scale, norm, keep, h, c, to_out
            step_backward(*ours, to_x, to_products, to_z, grad_norm, grad_scale)
            through_z = to_z @ embed_weight
            if not embed_previous:
                hyper_h += through_z
            ours = s, hyper_x, hyper_products, None, None, hyper_norm, hyper_keep, hyper_h, hyper_c, None
            step_backward(*ours, to_hyper_x, to_hyper_products, to_sums, grad_hyper_norm, None)
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
    # Of all outputs, those that nothing was made of have no gradient.
    grad_state = [torch.zeros_like(s) if grad is None else grad for s, grad in zip(state, grads[1:5], strict=True)]
    grad_output = grads[0]
    if grad_output is None:
        grad_output = state[0].new_zeros(projected.shape[0], state[0].shape[1])
    found = hyper_lstm_backward(
        grad_output, grad_state, projected, weight_h, weights, norms, mask, hyper_mask, kept, *ctx.options
    )
    return found[0], found[1], found[2:7], found[7:-4], None, None, found[-4:], None, None, None, None


hyper_lstm.register_autograd(_gradients, setup_context=_keep)
