"""The dynamic filtering layers against their definition in float64."""

import itertools
import shutil

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from lightning_meta.dynamic_filters.layers import (
    DynamicConv2d,
    DynamicLocalFilter,
    dynamic_convolution,
    dynamic_local_filter,
    eager_local_filter,
    expected_displacement,
)

MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def literal(x: Tensor, f: Tensor, kernel, softmax=True, padding_mode="zeros", groups=1) -> Tensor:
    """The paper's sum, one pixel after another."""
    (kh, kw), C = kernel, x.shape[1]
    padded = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2), mode=MODES[padding_mode])
    y = torch.empty_like(x)
    for b, c, i, j in itertools.product(*map(range, x.shape)):
        taps = f[b, :, i, j].unflatten(0, (groups, kh, kw))[c // (C // groups)]
        taps = taps.flatten().softmax(0).view(kh, kw) if softmax else taps
        y[b, c, i, j] = (taps * padded[b, c, i : i + kh, j : j + kw]).sum()
    return y


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize(("C", "groups", "kernel"), [(1, 1, (3, 3)), (3, 1, (5, 3)), (4, 2, (1, 5))])
def test_eager_local_filter_is_the_papers_sum(C, groups, kernel, padding_mode, softmax):
    x, f = (t.detach() for t in inputs(C, kernel, (4, 5), groups, x_dtype=torch.float64, f_dtype=torch.float64))
    options = {"softmax": softmax, "padding_mode": padding_mode, "groups": groups}
    torch.testing.assert_close(eager_local_filter(x, f, kernel, **options), literal(x, f, kernel, **options))


def in_float64(x: Tensor, f: Tensor, kernel, **options) -> Tensor:
    return eager_local_filter(x.double(), f.double(), kernel, **options)


def inputs(C, kernel, size, groups=1, layout="contiguous", x_dtype=torch.float32, f_dtype=torch.float32, B=2):
    x = torch.randn(B, C, *size).to(x_dtype).requires_grad_()
    f = (3 * torch.randn(B, groups * kernel[0] * kernel[1], *size)).to(f_dtype)
    if layout == "channels_last":
        f = f.contiguous(memory_format=torch.channels_last)
    return x, f.requires_grad_()


def check(x, f, kernel, tolerance, **options):
    y, wanted = dynamic_local_filter(x, f, kernel, **options), in_float64(x, f, kernel, **options)
    grad_y = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (x, f), grad_y))
    wanted = (wanted, *torch.autograd.grad(wanted, (x, f), grad_y.double()))
    for a, b, like in zip(got, wanted, (x, x, f), strict=True):
        assert a.dtype == like.dtype
        scale = b.abs().max().double().item()
        assert (a.double() - b.double()).abs().max().item() <= tolerance * max(scale, 1)
    assert got[2].stride() == f.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (5, 3), (1, 1)])
@pytest.mark.parametrize(("C", "groups"), [(1, 1), (3, 1), (4, 2), (3, 3)])
def test_local_filter_equals_definition(C, groups, kernel, padding_mode, softmax, layout):
    x, f = inputs(C, kernel, (6, 7), groups, layout)
    check(x, f, kernel, 2e-6, softmax=softmax, padding_mode=padding_mode, groups=groups)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("B", "C", "groups", "size"), [(2, 3, 1, (90, 64)), (17, 2, 2, (16, 16)), (2, 9, 9, (40, 40))])
def test_local_filter_over_several_tiles(B, C, groups, size, layout):
    """More filters than one tile holds: rows, samples and groups are split, and the last piece is smaller."""
    x, f = inputs(C, (9, 7), size, groups, layout, B=B)
    check(x, f, (9, 7), 5e-6, groups=groups)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(
    ("x_dtype", "f_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 2e-6),
        (torch.float32, torch.bfloat16, 4e-3),  # the gradient of the filters is rounded to bfloat16
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.bfloat16, torch.float32, 1e-2),
    ],
)
def test_local_filter_dtypes(x_dtype, f_dtype, tolerance, softmax, layout):
    x, f = inputs(3, (5, 3), (8, 9), 1, layout, x_dtype, f_dtype)
    check(x, f, (5, 3), tolerance, softmax=softmax)


def test_mixed_precision_output_is_not_rounded():
    x, f = inputs(3, (5, 5), (8, 9), f_dtype=torch.bfloat16)
    torch.testing.assert_close(dynamic_local_filter(x, f, 5).double(), in_float64(x, f, (5, 5)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needed", ["x", "filters"])
def test_one_gradient_alone(needed):
    x, f = inputs(3, (3, 3), (6, 7))
    (f if needed == "x" else x).requires_grad_(False)
    leaf = x if needed == "x" else f
    got, wanted = (
        torch.autograd.grad(y.sum(), leaf)[0] for y in (dynamic_local_filter(x, f, 3), in_float64(x, f, (3, 3)))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_large_logits_and_masked_taps():
    x, f = inputs(1, (3, 3), (5, 5))
    f = (300 * f.detach()).index_fill(1, torch.tensor([2, 5]), -torch.inf).requires_grad_()
    y = dynamic_local_filter(x, f, 3)
    torch.testing.assert_close(y.double(), in_float64(x, f, (3, 3)), rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(y.sum(), f)[0].isfinite().all()


def test_other_strides():
    x, f = inputs(3, (3, 5), (6, 8), x_dtype=torch.float64, f_dtype=torch.float64)
    wanted = dynamic_local_filter(x, f, (3, 5))
    torch.testing.assert_close(dynamic_local_filter(x.contiguous(memory_format=torch.channels_last), f, (3, 5)), wanted)
    transposed = f.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(dynamic_local_filter(x, transposed, (3, 5)), wanted)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("C", "kernel", "groups"), [(1, (3, 1), 1), (3, (1, 3), 1), (2, (3, 3), 2)])
def test_gradcheck_local_filter(C, kernel, groups, softmax):
    x, f = inputs(C, kernel, (3, 4), groups, x_dtype=torch.float64, f_dtype=torch.float64, B=1)

    def function(x, f):
        return dynamic_local_filter(x, f, kernel, softmax=softmax, groups=groups)

    assert torch.autograd.gradcheck(function, (x, f), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (x, f), check_fwd_over_rev=True)
    for detached in ((x.detach(), f), (x, f.detach())):
        assert torch.autograd.gradgradcheck(function, detached)


def test_second_order_keeps_dtypes():
    x, f = inputs(2, (3, 3), (4, 5), f_dtype=torch.bfloat16)
    grads = torch.autograd.grad(dynamic_local_filter(x, f, 3).square().sum(), (x, f), create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in grads), (x, f))
    assert [g.dtype for g in second] == [torch.float32, torch.bfloat16]


def forward_ad(function):
    """The tangent of ``function`` for a tangent of ones, by ``torch.autograd.forward_ad``."""

    def tangent(f):
        with fwAD.dual_level():
            return fwAD.unpack_dual(function(fwAD.make_dual(f, torch.ones_like(f)))).tangent

    return tangent


TRANSFORMS = {
    "grad": lambda function: torch.func.grad(lambda f: function(f).square().sum()),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda function: torch.func.hessian(lambda f: function(f).square().sum()),
    "jvp": lambda function: lambda f: torch.func.jvp(function, (f,), (torch.ones_like(f),))[1],
    "vjp": lambda function: lambda f: torch.func.vjp(function, f)[1](torch.ones(1, 2, 2, 3, dtype=f.dtype))[0],
    "linearize": lambda function: lambda f: torch.func.linearize(function, f)[1](torch.ones_like(f)),
    "vmap": lambda function: lambda f: torch.func.vmap(function)(torch.stack([f, f.sin()])),
    "gradient of each": lambda function: (
        lambda f: torch.func.vmap(torch.func.grad(lambda f: function(f).square().sum()))(torch.stack([f, f.sin()]))
    ),
    "forward mode": forward_ad,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_equal_those_of_the_definition(transform, compiled):
    x, f = (t.detach() for t in inputs(2, (3, 1), (2, 3), x_dtype=torch.float64, f_dtype=torch.float64, B=1))
    found, wanted = (
        TRANSFORMS[transform](lambda f, layer=layer: layer(x * f.mean(), f, (3, 1)))
        for layer in (dynamic_local_filter, eager_local_filter)
    )
    found, wanted = torch.compile(found, backend="eager") if compiled else found, wanted(f)
    assert wanted.any()
    torch.testing.assert_close(found(f), wanted)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("padding_mode", MODES)
def test_gradcheck_convolution(padding_mode, softmax):
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    f = torch.randn(2, 3, 2, 3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, f: dynamic_convolution(x, f, padding_mode, softmax=softmax), (x, f))


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout, softmax):
    x, f = inputs(3, (3, 5), (5, 6), layout=layout)
    padded = F.pad(x.detach(), (2, 2, 1, 1))[:, None].requires_grad_()
    filters = f.detach().unflatten(1, (1, 3, 5)).requires_grad_()
    op = torch.ops.lightning_meta.local_filter
    torch.library.opcheck(op, (padded, filters, softmax))
    y, stats = (t.detach() for t in op(padded, filters, softmax))
    args = (torch.randn_like(y), padded.detach(), filters.detach(), y, stats, softmax, True, True)
    torch.library.opcheck(torch.ops.lightning_meta.local_filter_backward, args)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (5, 3)])
def test_one_hot_filter_shifts(kernel):
    """Tap k reads the pixel at (dy_k, dx_k), or zero outside; the expected displacement is exactly that."""
    kh, kw = kernel
    x = torch.randn(1, 2, 7, 8)
    for k in range(kh * kw):
        dy, dx = k // kw - kh // 2, k % kw - kw // 2
        f = torch.zeros(1, kh * kw, 7, 8)
        f[:, k] = 1
        wanted = torch.zeros_like(x)
        for i in range(7):
            for j in range(8):
                if 0 <= i + dy < 7 and 0 <= j + dx < 8:
                    wanted[..., i, j] = x[..., i + dy, j + dx]
        assert torch.equal(dynamic_local_filter(x, f, kernel, softmax=False), wanted)
        assert torch.equal(expected_displacement(f, kernel, softmax=False)[0, :, 3, 3], torch.tensor([dx, dy]).float())
        logits = torch.where(f > 0, 0.0, -torch.inf)
        assert torch.equal(expected_displacement(logits, kernel)[0, :, 3, 3], torch.tensor([dx, dy]).float())


def test_uniform_is_box_blur_and_constant_stays():
    x, f = torch.randn(2, 3, 9, 10), torch.full((2, 15, 9, 10), 4.2)
    box = F.avg_pool2d(x, (3, 5), stride=1, padding=(1, 2), count_include_pad=True)
    torch.testing.assert_close(dynamic_local_filter(x, f, (3, 5)), box)
    y = dynamic_local_filter(torch.full((1, 1, 9, 10), 0.7), torch.randn(1, 15, 9, 10), (3, 5))
    torch.testing.assert_close(y[..., 1:-1, 2:-2], torch.full((1, 1, 7, 6), 0.7))
    assert y[..., 0, 0] < 0.7


def test_filter_constant_over_positions_is_conv2d():
    x, f = torch.randn(1, 3, 8, 9), torch.randn(15)
    y = dynamic_local_filter(x, f[None, :, None, None].expand(1, 15, 8, 9), (3, 5), softmax=False)
    torch.testing.assert_close(y, F.conv2d(x, f.view(1, 1, 3, 5).expand(3, 1, 3, 5), padding=(1, 2), groups=3))


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize(("C", "O", "kernel"), [(1, 1, (9, 9)), (3, 4, (3, 5))])
def test_convolution_equals_loop(C, O, kernel, padding_mode, softmax):
    x, f = torch.randn(3, C, 10, 11), torch.randn(3, O, C, *kernel)
    weight = f.flatten(3).softmax(3).view_as(f) if softmax else f
    kh, kw = kernel
    padded = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2), mode=MODES[padding_mode])
    wanted = torch.cat([F.conv2d(padded[b : b + 1], weight[b]) for b in range(3)])
    torch.testing.assert_close(dynamic_convolution(x, f, padding_mode, softmax=softmax), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        DynamicConv2d(kernel, softmax, padding_mode)(x, f), dynamic_convolution(x, f, padding_mode, softmax=softmax)
    )


def test_expected_displacement_is_centre_of_mass():
    f = torch.randn(2, 15, 4, 5)
    p = f.softmax(1)
    dx = sum(p[:, k] * (k % 5 - 2) for k in range(15))
    dy = sum(p[:, k] * (k // 5 - 1) for k in range(15))
    torch.testing.assert_close(expected_displacement(f, (3, 5)), torch.stack([dx, dy], 1))


def allocations(function) -> tuple[int, int]:
    """Peak of allocated bytes and the largest block, as the CPU allocator reports them, also inside operators."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak, largest = max(peak, allocated), max(largest, event.nbytes())
    assert largest > 0
    del result
    return peak, largest


def forward_and_backward(x, f, grad_y, kernel):
    return lambda: torch.autograd.grad(dynamic_local_filter(x, f, kernel), (x, f), grad_y)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("f_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("B", "C", "size", "K"), [(16, 1, 64, 9), (8, 3, 128, 11)])
def test_memory_is_the_filters_gradient_and_10_mib(B, C, size, K, f_dtype, layout):
    x, f = inputs(C, (K, K), (size, size), 1, layout, f_dtype=f_dtype, B=B)
    peak, largest = allocations(forward_and_backward(x, f, torch.randn(B, C, size, size), K))
    grad_filters = f.numel() * f.element_size()
    assert largest <= grad_filters
    assert peak <= grad_filters + 10 * 2**20
    forward, _ = allocations(lambda: dynamic_local_filter(x, f, K))
    assert forward <= 10 * 2**20  # no probabilities


def test_memory_does_not_grow_with_channels_times_taps():
    x, f = inputs(16, (9, 9), (64, 64), B=1)
    peak, largest = allocations(forward_and_backward(x, f, torch.randn(1, 16, 64, 64), 9))
    assert largest <= 2 * f.nbytes  # one tile is enough here; a copy of all windows of x would be 16 times as large
    assert peak <= 4 * f.numel() + 10 * 2**20


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_gradients_equal_eager(backend, layout):
    """Three channels and two threads: here the compiler has computed views of windows wrongly."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    torch.set_num_threads(2)
    x, f = inputs(3, (9, 9), (40, 40), 1, layout)
    grad_y = torch.randn(2, 3, 40, 40)

    def function(x, f):
        return 2 * dynamic_local_filter(x + 1, f * 0.5, 9)

    compiler = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    got, wanted = ((y, *torch.autograd.grad(y, (x, f), grad_y)) for y in (compiled(x, f), function(x, f)))
    assert compiler.frame_count == 1
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_graph_has_one_local_filter():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    x, f = inputs(3, (3, 3), (6, 7))
    torch.compile(DynamicLocalFilter(3), backend=backend, fullgraph=True)(x, f)
    nodes = [str(node.target) for graph in graphs for node in graph.graph.nodes if "local_filter" in str(node.target)]
    assert len(graphs) == len(nodes) == 1


@pytest.mark.parametrize("layer", ["local", "convolution"])
def test_export(layer):
    x, f = inputs(3, (3, 5), (6, 7))
    model = DynamicLocalFilter((3, 5), padding_mode="replicate")
    if layer == "convolution":
        model, f = DynamicConv2d((3, 5)), torch.randn(2, 4, 3, 3, 5)
    program = torch.export.export(model, (x.detach(), f.detach()))
    torch.testing.assert_close(program.module()(x, f), model(x, f))
    assert sum("local_filter" in str(node.target) for node in program.graph.nodes) == (layer == "local")


def test_autocast_keeps_the_image_in_float32():
    x, f = inputs(3, (3, 3), (6, 7))
    weight = torch.randn(9, 9, 1, 1)
    bank = torch.randn(2, 4, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        generated = F.conv2d(f, weight)
        assert generated.dtype == torch.bfloat16
        y = dynamic_local_filter(x, generated, 3)
        convolved = dynamic_convolution(x, bank)
        flow = expected_displacement(f, 3)
    assert torch.equal(y, dynamic_local_filter(x, generated, 3))
    assert torch.equal(convolved, dynamic_convolution(x, bank))
    assert torch.equal(flow, expected_displacement(f, 3))
    assert dynamic_convolution(x, bank.bfloat16()).dtype == y.dtype == torch.float32
    torch.autograd.grad(y.sum(), (x, f))


def test_modules():
    x, f = inputs(4, (3, 5), (6, 7), groups=2)
    layer = DynamicLocalFilter((3, 5), softmax=False, padding_mode="reflect", groups=2)
    wanted = dynamic_local_filter(x, f, (3, 5), softmax=False, padding_mode="reflect", groups=2)
    assert torch.equal(layer(x, f), wanted)
    assert repr(layer) == "DynamicLocalFilter(kernel_size=(3, 5), softmax=False, padding_mode='reflect', groups=2)"
    assert repr(DynamicConv2d(3)) == "DynamicConv2d(kernel_size=(3, 3), softmax=False, padding_mode='zeros')"
    assert not list(layer.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, f: dynamic_local_filter(x, f, 4), "odd kernel size .* got 4"),
        (lambda x, f: dynamic_local_filter(x, f, (3, 2)), "odd kernel size"),
        (lambda x, f: dynamic_local_filter(x, f, 5), r"expected filters of shape \(2, 25, 6, 7\).*got \(2, 9, 6, 7\)"),
        (lambda x, f: dynamic_local_filter(x, f[..., 1:], 3), "expected filters of shape"),
        (lambda x, f: dynamic_local_filter(x, f[:1], 3), "expected filters of shape"),
        (lambda x, f: dynamic_local_filter(x, f[0], 3), "expected filters of shape"),
        (lambda x, f: dynamic_local_filter(x[0], f, 3), r"shape \(B, C, H, W\), got"),
        (lambda x, f: dynamic_local_filter(x.int(), f, 3), "expected floating x"),
        (lambda x, f: dynamic_local_filter(x, f, 3, padding_mode="same"), "expected padding_mode .* got 'same'"),
        (lambda x, f: dynamic_local_filter(x, f, 3, groups=2), "groups to divide the 3 channels .* got 2"),
        (lambda x, f: dynamic_local_filter(x, f, 3, groups=0), "groups to divide"),
        (
            lambda x, f: dynamic_local_filter(x[..., :1, :], f[..., :1, :], 3, padding_mode="reflect"),
            "reflect padding of at most",
        ),
        (lambda x, f: DynamicLocalFilter(2), "odd kernel size"),
        (lambda x, f: DynamicLocalFilter(3, padding_mode="same"), "expected padding_mode"),
        (lambda x, f: dynamic_convolution(x, f), r"expected filters of shape \(2, O, 3, Kh, Kw\)"),
        (lambda x, f: dynamic_convolution(x, torch.zeros(2, 4, 3, 2, 3)), "odd kernel size"),
        (lambda x, f: dynamic_convolution(x, torch.zeros(1, 4, 3, 3, 3)), "one filter bank per sample"),
        (lambda x, f: DynamicConv2d(5)(x, torch.zeros(2, 4, 3, 3, 3)), r"expected filters \(B, O, C, 5, 5\)"),
        (lambda x, f: expected_displacement(f, 5), r"expected filters of shape \(B, 25, H, W\)"),
    ],
)
def test_errors_say_what_to_do(call, message):
    x, f = torch.zeros(2, 3, 6, 7), torch.zeros(2, 9, 6, 7)
    with pytest.raises(ValueError, match=message) as error:
        call(x, f)
    assert "\n" not in str(error.value)
