import subprocess
import sys

import pytest
import torch

from lightning_meta.dynamic_filters.export import Forecaster, export
from lightning_meta.dynamic_filters.video import FramePredictor

LAYOUTS = {
    "moving_mnist": ({"kernel_size": 5}, 4),
    "highway": ({"layout": "highway", "kernel_size": 3, "dynamic_bias": True, "untied_bias": (16, 12)}, 3),
}


@pytest.fixture(params=LAYOUTS)
def forecaster(request):
    torch.manual_seed(0)
    options, inputs = LAYOUTS[request.param]
    predictor = FramePredictor(width=4, gain=1.4, **options).to(memory_format=torch.channels_last)
    return Forecaster(predictor, predictions=3).eval(), torch.rand(2, inputs, 1, 16, 12)


def test_the_exported_program_gives_the_same_frames_without_this_package(forecaster, tmp_path):
    model, frames = forecaster
    program = export(model, frames)
    assert not any("lightning_meta" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "forecaster.pt2")
    more = torch.rand(5, *frames.shape[1:])
    torch.save(more, tmp_path / "frames.pt")
    code = (
        "import sys, torch; run = torch.export.load('forecaster.pt2').module(); "
        "torch.save(run(torch.load('frames.pt')), 'found.pt'); "
        "assert not any(name.startswith('lightning') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = model(more)
    assert expected.shape == (5, 3, 1, 16, 12)
    torch.testing.assert_close(torch.load(tmp_path / "found.pt").detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_onnx_gives_the_same_frames(forecaster, tmp_path):
    import onnxruntime

    model, frames = forecaster
    path = str(tmp_path / "forecaster.onnx")
    torch.onnx.export(export(model, frames), f=path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    more = torch.rand(3, *frames.shape[1:])
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(more), rtol=1e-4, atol=1e-5)
