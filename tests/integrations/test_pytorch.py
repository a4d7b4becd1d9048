"""Back to PyTorch: modules cut as their exports were compute the same as the pruned files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_runs import CPU as CPU_OPTIONS
from doc_pages import body_of, commands_of

import onnxcop
from onnxcop.cli import main as cli
from onnxcop.errors import PlanMismatchError
from onnxcop.runtime.session import Session

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nn = torch.nn
CPU = onnxcop.EngineOptions("cpu", 1)


def _norm(channels: int) -> Any:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


class _Block(nn.Module):  # type: ignore[misc]
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), _norm(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), _norm(channels)

    def forward(self, x: Any) -> Any:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def _residual() -> Any:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), _norm(32), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), _Block(16), down, _Block(32), head)


class _Inverted(nn.Module):  # type: ignore[misc]
    """An inverted residual, with a depthwise convolution."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), _norm(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), _norm(wide), nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False), _norm(channels),
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        return x + self.body(x)


def _mobile() -> Any:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), _norm(16), nn.ReLU6())
    return nn.Sequential(
        stem, _Inverted(16, 48), _Inverted(16, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def _preactivated() -> Any:
    """BatchNorm before a ReLU before each convolution: the exporter cannot fold it."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), _norm(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.Tanh(),
        _norm(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


def _untrained() -> Any:
    """Layers whose biases are all zeros, which the exporter stores once."""
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Sigmoid()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    for layer in net:
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
    return net


class _Gates(nn.Module):
    """Layers that gate one another, whose biases are all zeros and of one size; two are pruned apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.squeezed = nn.ModuleList([nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)])
        self.widened = nn.ModuleList([nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)])
        self.apart = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)
        for part in (*self.squeezed, *self.widened, self.apart):
            nn.init.zeros_(part.bias)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.stem(x))
        for squeeze, widen in zip(self.squeezed, self.widened, strict=True):
            x = torch.relu(self.apart(x)) if squeeze is self.squeezed[1] else x
            x = x * torch.sigmoid(widen(torch.relu(squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(x.mean((2, 3)))


def _exported(net: Any, path: Path) -> Any:
    x = torch.randn(4, 3, 12, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "N"}})
    return x


@pytest.mark.parametrize("recover", ["none", "merge"])
@pytest.mark.parametrize("make", [_residual, _mobile, _preactivated, _untrained, _Gates])
def test_a_module_computes_what_its_pruned_export_does(make: Callable[[], Any], recover: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = make().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x = _exported(net, tmp_path / "net.onnx")
    data = None if recover == "none" else np.random.default_rng(0).standard_normal((48, 3, 12, 12)).astype(np.float32)
    result = onnxcop.prune(
        tmp_path / "net.onnx", macs=0.6, criterion="l2", recover=recover, data=data, options=CPU,
    )  # fmt: skip
    pruned = None if recover == "none" else result.model
    found = onnxcop.torch_state(result.plan, net.state_dict(), tmp_path / "net.onnx", pruned)
    assert found.unplaced == ()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())  # not changed
    torch.manual_seed(1)
    small = make().eval()
    onnxcop.resize_module(small, found)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    with Session(result.model, CPU) as session:
        (wanted,) = session.run({"x": x.numpy()}).values()
    np.testing.assert_allclose(small(x).detach().numpy(), wanted, atol=1e-4 * np.abs(wanted).max())
    loss = small.train()(x).square().mean()  # it trains on
    loss.backward()
    assert all(p.grad is not None for p in small.parameters())


def _resnet18() -> Any:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    net = models.resnet18()
    for name, part in net.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            net.set_submodule(name, _norm(part.num_features))
    return net


@pytest.mark.parametrize("make", [_residual, _resnet18])
def test_the_page_on_pytorch(
    make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command prunes an export, and its code gives a module that computes what the file does."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = make().eval()
    x = _exported(net, tmp_path / "model.onnx")
    np.savez("images.npz", x=np.random.default_rng(0).standard_normal((24, 3, 12, 12)).astype(np.float32))
    (command,) = commands_of("howto/pytorch.md", "plan")
    assert cli.run([*command, *CPU_OPTIONS]) == 0
    capsys.readouterr()
    parameters = sum(p.numel() for p in net.parameters())
    exec(compile(body_of("howto/pytorch.md", "state dict"), "pytorch.md", "exec"), {"net": net})
    assert capsys.readouterr().out == "()\n"
    assert sum(p.numel() for p in net.parameters()) < parameters
    with Session("small.onnx", CPU) as session:
        (wanted,) = session.run({"x": x.numpy()}).values()
    np.testing.assert_allclose(net(x).detach().numpy(), wanted, atol=1e-4 * np.abs(wanted).max())


def test_what_is_not_in_the_state_dict_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = _mobile().eval()
    _exported(net, tmp_path / "net.onnx")
    result = onnxcop.prune(tmp_path / "net.onnx", macs=0.6, criterion="l2", recover="none", options=CPU)
    torch.manual_seed(7)
    other = _mobile().eval()  # of another training: no weight is found again
    found = onnxcop.torch_state(result.plan, other.state_dict(), tmp_path / "net.onnx")
    assert found.unplaced and "keeps" in found.unplaced[0]
    with pytest.raises(PlanMismatchError, match="the state dict lacks what the plan cuts"):
        onnxcop.resize_module(other, found)
    with pytest.raises(PlanMismatchError, match="made for another model"):
        onnxcop.torch_state(result.plan, other.state_dict(), result.model)


def test_arrays_are_cut_without_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = _residual().eval()
    _exported(net, tmp_path / "net.onnx")
    result = onnxcop.prune(tmp_path / "net.onnx", macs=0.6, criterion="l2", recover="none", options=CPU)
    result.save(tmp_path / "small.onnx")
    (tmp_path / "plan.json").write_text(result.plan.to_json())
    arrays = {key: value.numpy() for key, value in net.state_dict().items()}
    found = onnxcop.torch_state(tmp_path / "plan.json", arrays, tmp_path / "net.onnx")
    stored = {tensor.name: tensor.dims for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert [list(found.state[key].shape) for key in ("4.2.weight", "4.4.weight")] == [
        list(stored["4.2.weight"]), list(stored["4.4.weight"]),
    ]  # fmt: skip
