import importlib.util
import json
import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import predict
from my_dataset import DriveDataset
from src import create_model, load_pretrained
from src.segmenter import PRETRAINED
from tests.conftest import refusal
from train_utils import export, save_checkpoint

SMALL = {"unet": {"base_c": 4}, "unet_paper": {"base_c": 4}, "mobilenet_v3": {}, "vgg16": {}}


with_an_exporter = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="PyTorch 2.6 cannot translate the padding",
)


def varied_model(arch, **model_args):
    """With weights and running statistics that make the logits vary as those of a trained model."""
    torch.manual_seed(0)
    model = create_model(arch, **(SMALL[arch] | model_args)).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model


def outputs(model, image):
    with torch.inference_mode():
        logits = model(image)["out"]
    assert logits.std() > 0.05
    return logits


@with_an_exporter
@pytest.mark.parametrize(
    "arch, model_args",
    [
        ("unet", {}),
        pytest.param("unet", {"bilinear": False, "in_channels": 1}, marks=pytest.mark.slow),
        *(pytest.param(arch, {}, marks=pytest.mark.slow) for arch in ("unet_paper", "mobilenet_v3", "vgg16")),
    ],
)
def test_onnx_runtime_agrees_at_any_size(tmp_path, capsys, arch, model_args):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    model = varied_model(arch, **model_args)
    save_checkpoint(
        {"model": model.state_dict(), "model_args": model.model_args, "mean": [0.5] * 3, "std": [0.1, 0.2, 0.3]}
        | {"fov_diameter": 300.0, "tta": True, "tta_scales": [1.0, 1.0]},
        tmp_path / "weights.pth",
    )
    file = tmp_path / "model.onnx"
    predict.main(predict.parse_args(["--weights", str(tmp_path / "weights.pth"), "--export", str(file)]))
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "weights.pth"]
    assert f"{file}: the model of" in capsys.readouterr().out

    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(file, options)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["std"]) == [0.1, 0.2, 0.3] and json.loads(metadata["mean"]) == [0.5] * 3
    assert json.loads(metadata["model_args"]) == model.model_args
    assert [json.loads(metadata[name]) for name in ("fov_diameter", "tta", "tta_scales")] == [300.0, True, [1.0, 1.0]]
    assert "threshold" not in metadata
    for count, height, width in ((1, 64, 64), (2, 77, 90), (1, 131, 35), (1, 32, 50)):
        image = torch.rand(count, model.model_args.get("in_channels", 3), height, width)
        (logits,) = session.run(["logits"], {"image": image.numpy()})
        expected = outputs(model, image).numpy()
        assert logits.shape == expected.shape and np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize(
    "arch", ["unet", "unet_paper", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("mobilenet_v3", "vgg16"))]
)
def test_torch_export_at_any_size(arch):
    model = varied_model(arch)
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.rand(2, 3, 99, 85),), dynamic_shapes={"x": {0: free, 2: free, 3: free}}
    ).module()
    for count, height, width in ((1, 64, 64), (3, 77, 90), (1, 131, 35)):
        image = torch.rand(count, 3, height, width)
        assert torch.allclose(outputs(program, image), outputs(model, image), atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("arch", SMALL)
def test_torch_compile(arch):
    model = varied_model(arch)
    compiled = torch.compile(model)
    image = torch.rand(1, 3, 77, 90)
    assert torch.allclose(outputs(compiled, image), outputs(model, image), atol=1e-4)
    logits = compiled.train()(torch.rand(2, 3, 64, 64))["out"]
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def fails(capsys, *flags):
    return refusal(capsys, predict, *flags)


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert "--export: needs what is not installed here; pip install" in fails(
        capsys, "--export", str(tmp_path / "model.onnx")
    )


def test_no_other_file_is_replaced(capsys, tmp_path):
    photograph = tmp_path / "photograph.jpg"
    photograph.write_bytes(b"a photograph")
    assert "photograph.jpg: is there, and no .onnx file" in fails(capsys, "--export", str(photograph))
    assert "is there, and no .onnx file" in fails(capsys, "--export", str(tmp_path))
    assert photograph.read_bytes() == b"a photograph"


def test_a_folder_that_cannot_be_made_is_told_first(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_model", None)
    (tmp_path / "file").touch()
    message = fails(capsys, "--export", str(tmp_path / "file" / "model.onnx"))
    assert str(tmp_path / "file") in message and "not installed" not in message


def test_an_exporter_that_is_too_old(capsys, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise torch.onnx.OnnxExporterError("no such operator")

    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.setattr(torch.onnx, "export", fail)
    save_checkpoint({"model": varied_model("unet").state_dict()}, tmp_path / "weights.pth")
    flags = ("--weights", str(tmp_path / "weights.pth"), "--export", str(tmp_path / "model.onnx"))
    assert "cannot write this model as ONNX" in fails(capsys, *flags)


def test_weights_that_are_missing(capsys, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    gone = str(tmp_path / "gone.pth")
    assert "gone.pth: no such file" in fails(capsys, "--weights", gone, "--export", str(tmp_path / "model.onnx"))


@with_an_exporter
@pytest.mark.slow
def test_the_pretrained_weights_give_the_same_masks_in_onnx_runtime(tmp_path, real_drive):
    """With the preparation, the sizes and the flips of predict.py around it."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    predict.main(predict.parse_args(["--weights", str(PRETRAINED), "--export", str(tmp_path / "model.onnx")]))
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    segmenter, differences = load_pretrained(), []
    network = segmenter.model

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(16, 3, 1, 1))  # tells the device and the width

        def forward(self, image):
            logits = torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])
            differences.append((logits - network(image)["out"]).abs().max().item())
            return {"out": logits}

    for item in DriveDataset(real_drive, False).files[:2]:
        segmenter.model = network
        expected = segmenter(item.photograph).labels
        segmenter.model = Twin().eval()
        assert np.array_equal(segmenter(item.photograph).labels, expected)
    assert max(differences) < 1e-3
