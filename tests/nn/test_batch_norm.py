import pytest
import torch
from torch import nn

from lightning_meta.nn.batch_norm import BatchNorm2d

STEPS, PROCESSES = 3, 2
CHANNELS = 3


def batches():
    """Images and the gradients of their outputs. The two halves of a batch have very different statistics."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 4, CHANNELS, 2, 5, generator=random, dtype=torch.float64)
    x = x * torch.tensor([0.5, 3.0, 1.0, 2.0]).view(-1, 1, 1, 1) + torch.arange(4).view(-1, 1, 1, 1)
    return x, torch.randn(x.shape, generator=random, dtype=torch.float64)


def run(layer, x, g):
    """Return outputs and gradients of each training step, the output in evaluation, and the final buffers."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    left = {"y": [], "x.grad": []}
    for step in range(STEPS):
        pictures = x[step].clone().requires_grad_()
        y = layer(pictures)
        (y * g[step]).sum().backward()
        left["y"].append(y.detach())
        left["x.grad"].append(pictures.grad)
    left = {name: torch.stack(values) for name, values in left.items()}
    left["y in eval mode"] = layer.eval()(x[:1].flatten(0, 1)).detach()[None]
    return left | {"weight.grad": layer.weight.grad, "bias.grad": layer.bias.grad} | dict(layer.named_buffers())


def child(rank, folder, momentum):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    half = [value.chunk(PROCESSES, 1)[rank] for value in batches()]
    torch.save(run(BatchNorm2d(CHANNELS, momentum=momentum).double(), *half), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_process_is_torchs_layer(momentum):
    ours, theirs = (run(cls(CHANNELS, momentum=momentum).double(), *batches()) for cls in (BatchNorm2d, nn.BatchNorm2d))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
def test_two_processes_are_one_with_the_whole_batch(tmp_path, processes, momentum):
    started = [processes.Process(target=child, args=(rank, tmp_path, momentum)) for rank in range(PROCESSES)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    whole = run(nn.BatchNorm2d(CHANNELS, momentum=momentum).double(), *batches())
    close = {"rtol": 1e-10, "atol": 1e-12}
    for name in ("y", "x.grad", "y in eval mode"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts], 1), whole[name], **close)
    for name in (
        "weight.grad",
        "bias.grad",
    ):  # each process has the gradient of its own samples; DistributedDataParallel sums them
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], **close)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for part in parts:
            torch.testing.assert_close(part[name], whole[name], **close)
