"""The implementations of the operator behind dynamic_local_filter, each against the definition in float64."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_meta.dynamic_filters.layers import DynamicLocalFilter, dynamic_local_filter
from lightning_meta.dynamic_filters.ops import local_filter, local_filter_native, local_filter_plain
from tests.conftest import ROOT
from tests.dynamic_filters.test_layers import check, inputs

LAYOUTS = ["contiguous", "channels_last"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def native(monkeypatch):
    """Use C++ for filters of any size, and nothing else."""
    if local_filter_native._library() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(local_filter, "WORTH_BUILDING", 0)
    monkeypatch.setattr(local_filter, "local_filter_plain", None)


def slope(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)


def results(x: Tensor, f: Tensor, kernel, **options) -> tuple[Tensor, ...]:
    y = dynamic_local_filter(x, f, kernel, **options)
    return y, *torch.autograd.grad(y, (x, f), slope(y))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("C", "groups", "kernel", "size"),
    [
        (1, 1, (3, 3), (8, 16)),
        (3, 1, (5, 3), (6, 7)),
        (4, 2, (3, 5), (20, 9)),
        (3, 3, (1, 5), (3, 8)),
        (2, 1, (5, 1), (40, 5)),
        (4, 1, (1, 1), (2, 2)),
        (7, 1, (3, 7), (5, 150)),
        (2, 1, (3, 3), (2, 263)),
        (12, 2, (3, 3), (4, 5)),
    ],
)
def test_native_equals_definition(C, groups, kernel, size, padding_mode, softmax, layout):
    """Sizes that fill vectors and sizes that do not, several batches of channels, several tiles of rows and columns."""
    if padding_mode in ("reflect", "circular") and min(size) <= max(kernel) // 2:
        padding_mode = "zeros"
    x, f = inputs(C, kernel, size, groups, layout)
    check(x, f, kernel, 3e-6, softmax=softmax, padding_mode=padding_mode, groups=groups)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(
    ("x_dtype", "f_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.bfloat16, 4e-3),  # the gradient of the filters is rounded to bfloat16
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.bfloat16, torch.float32, 1e-2),
    ],
)
def test_native_dtypes(x_dtype, f_dtype, tolerance, softmax, layout):
    x, f = inputs(3, (5, 3), (8, 19), 1, layout, x_dtype, f_dtype)
    check(x, f, (5, 3), tolerance, softmax=softmax)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("f_dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_any_number_of_threads(f_dtype, layout):
    x, f = inputs(3, (5, 3), (50, 140), 1, layout, f_dtype=f_dtype)
    one = results(x, f, (5, 3))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(one, results(x, f, (5, 3)), strict=True))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "one tap", "all taps"])
def test_nan_and_infinity_propagate_as_in_pytorch(monkeypatch, where, value, layout):
    x, f = inputs(2, (3, 3), (6, 19), 1, layout)
    with torch.no_grad():
        (x if where == "x" else f)[0, slice(None) if where == "all taps" else 1, 2, 10] = value
    found = results(x, f, 3)
    monkeypatch.setattr(local_filter, "WORTH_BUILDING", 2**60)
    monkeypatch.setattr(local_filter, "local_filter_plain", local_filter_plain)
    wanted = results(x, f, 3)
    assert (where == "one tap" and value == -torch.inf) or not all(part.isfinite().all() for part in wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("native")
def test_native_exponentials():
    """exp(f - max f) is right to 3 units in the last place, and exactly 0 below the smallest normal number."""
    difference = torch.cat([-torch.logspace(-8, 1.9, 3000), torch.tensor([0, -87.0, -88.0, -104.0, -1e30, -torch.inf])])
    filters = torch.stack([torch.zeros_like(difference), difference]).view(1, 1, 2, 1, 1, -1)
    x = torch.stack([torch.zeros_like(difference), torch.ones_like(difference)]).view(1, 1, 1, 2, -1)
    y, stats = local_filter.local_filter(x, filters, True)
    e = difference.double().exp()
    error = (y.flatten() * stats[1].flatten()).double() / e - 1
    assert error[: len(e) - 4].abs().max() < 4e-7 + 1.2e-7 * 126  # the product of logit and log2(e) is rounded, too
    assert error[difference > -1].abs().max() < 5e-7
    assert not y.flatten()[-4:].any()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("softmax", [True, False])
def test_native_gradients_of_gradients(softmax):
    x, f = inputs(2, (3, 1), (3, 4), 2, "channels_last", torch.float64, torch.float64, B=1)

    def function(x, f):
        return dynamic_local_filter(x, f, (3, 1), softmax=softmax, groups=2)

    assert torch.autograd.gradcheck(function, (x, f))
    assert torch.autograd.gradgradcheck(function, (x, f))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_native_opcheck(layout, softmax):
    x, f = inputs(3, (3, 5), (5, 6), layout=layout)
    padded = torch.nn.functional.pad(x.detach(), (2, 2, 1, 1))[:, None].requires_grad_()
    filters = f.detach().unflatten(1, (1, 3, 5)).requires_grad_()
    torch.library.opcheck(torch.ops.lightning_meta.local_filter, (padded, filters, softmax))
    y, stats = (t.detach() for t in torch.ops.lightning_meta.local_filter(padded, filters, softmax))
    for needs in ((True, True), (True, False), (False, True)):
        args = (torch.randn_like(y), padded.detach(), filters.detach(), y, stats, softmax, *needs)
        torch.library.opcheck(torch.ops.lightning_meta.local_filter_backward, args)


@pytest.mark.usefixtures("native")
def test_native_compiled_and_exported():
    torch.set_num_threads(2)
    x, f = inputs(3, (9, 9), (24, 24), 1, "channels_last")

    def function(x, f):
        return 2 * dynamic_local_filter(x + 1, f * 0.5, 9)

    compiler = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    grad_y = torch.randn_like(x)
    got, wanted = ((y, *torch.autograd.grad(y, (x, f), grad_y)) for y in (compiled(x, f), function(x, f)))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert compiler.frame_count == 1
    x, f = x.detach(), f.detach()
    program = torch.export.export(DynamicLocalFilter(9), (x, f))
    assert torch.equal(program.module()(x, f), dynamic_local_filter(x, f, 9))


@pytest.mark.parametrize("view", ["transposed", "expanded", "a part", "a part, channels_last"])
def test_other_strides(monkeypatch, view):
    """Every implementation takes them, whatever the layout of the gradient."""
    monkeypatch.setattr(local_filter, "WORTH_BUILDING", 0)
    f = torch.randn(2, 20, 6, 8)
    f = {
        "transposed": lambda: f[:, :15].transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: f[:1, :15].expand(2, 15, 6, 8),
        "a part": lambda: f[:, 3:18],
        "a part, channels_last": lambda: f.contiguous(memory_format=torch.channels_last)[:, 3:18, :, 1:7],
    }[view]()
    x = torch.randn(2, 3, *f.shape[2:], requires_grad=True)
    f.requires_grad_()
    for a, b in zip(results(x, f, (3, 5)), results(x, f.contiguous(), (3, 5)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_pixels():
    x, f = torch.zeros(0, 3, 4, 5, requires_grad=True), torch.zeros(0, 9, 4, 5, requires_grad=True)
    assert [part.shape[0] for part in results(x, f, 3)] == [0, 0, 0]


def test_small_inputs_do_not_trigger_compilation(monkeypatch):
    asked = []
    monkeypatch.setattr(local_filter_native, "_library", lambda: asked.append(True))
    for size in (2**8 - 1, 2**8):
        assert not asked
        dynamic_local_filter(torch.zeros(1, 1, size, 2**12), torch.zeros(1, 1, size, 2**12), 1)
    assert asked


@pytest.mark.parametrize("compiler", ["/nonexistent", "false"])
def test_without_a_compiler_it_runs(monkeypatch, tmp_path, compiler):
    x, f = inputs(3, (3, 5), (6, 7))
    wanted = results(x, f, (3, 5))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(local_filter_native, "_library", local_filter_native._library.__wrapped__)
    monkeypatch.setattr(local_filter, "WORTH_BUILDING", 0)
    assert all(torch.equal(a, b) for a, b in zip(wanted, results(x, f, (3, 5)), strict=True))
    assert not list(tmp_path.rglob("*.so"))


def triton_equals_definition() -> None:
    """Run Triton's kernels by its interpreter on the CPU. TRITON_INTERPRET must be set."""
    from lightning_meta.dynamic_filters.ops import local_filter_triton

    torch.manual_seed(0)
    for module in (local_filter_native, local_filter_plain):
        module.forward = module.backward = None
    local_filter._implementation = lambda x, filters: local_filter_triton
    for C, kernel, size, groups, softmax, layout in (
        (1, (3, 3), (2, 130), 1, True, "contiguous"),
        (3, (5, 3), (2, 3), 1, True, "channels_last"),
        (4, (1, 3), (2, 3), 2, False, "channels_last"),
    ):
        x, f = inputs(C, kernel, size, groups, layout)
        assert local_filter_triton.serves(f.unflatten(1, (groups, *kernel)), torch.float32)
        check(x, f, kernel, 3e-6, softmax=softmax, groups=groups)
    both = results(x, f, kernel, groups=groups)[1:]
    y = dynamic_local_filter(x, f, kernel, groups=groups)
    alone = (torch.autograd.grad(y, part, slope(y), retain_graph=True)[0] for part in (x, f))
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    x, f = inputs(2, (3, 3), (2, 3), 1, "contiguous", torch.bfloat16, torch.bfloat16, B=1)
    check(x, f, (3, 3), 1e-2)  # the interpreter truncates to bfloat16, a GPU rounds


def test_triton_equals_definition():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("there is no Triton")
    code = "from tests.dynamic_filters.test_local_filter import triton_equals_definition as check; check()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_gradients_of_no_channels_are_zero():
    memory = [torch.full((2 * 9 * 8 * 8,), 7e9) for _ in range(50)]
    del memory  # what was not set would be this
    filters = torch.randn(2, 9, 8, 8, requires_grad=True)
    dynamic_local_filter(torch.randn(2, 0, 8, 8), filters, 3).sum().backward()
    assert torch.equal(filters.grad, torch.zeros_like(filters))
