"""The quickest form: it agrees with the original, and what cannot be made here is passed over. Nothing here is timed."""

import sys

import pytest
import torch
from torch import nn

from saigen import speed
from saigen.nn.efficientnet_blocks import MBConv
from saigen.speed import Fastest, fastest, fold_batch_norms


def trained(model):
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model


def net():
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            MBConv(16, 16, stride=1),
            MBConv(16, 24, stride=2),
            nn.Flatten(),
            nn.Linear(24 * 16, 12),
            nn.BatchNorm1d(12),
        )
    )


X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_folding_removes_every_norm_and_changes_nothing():
    model = net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norms(model, X)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    assert any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert relative(folded(X), model.eval()(X)) < 1e-5
        other = torch.rand(2, 3, 8, 8)
        assert relative(folded(other), model(other)) < 1e-5


def test_folding_leaves_what_it_must_not_touch():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), trained(nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.norm(self.conv(self.conv(x)))

    with pytest.raises(ValueError, match="no batch norm"):
        fold_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4)), X)
    with pytest.raises(ValueError, match="no batch norm"):
        fold_batch_norms(Shared(), X)
    with pytest.raises(ValueError, match="no batch norm"):
        fold_batch_norms(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), X)


class ReadsTwice(nn.Module):
    """The convolution's own output is read as well as its norm's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), trained(nn.BatchNorm2d(3))

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def test_a_fold_that_would_change_the_result_is_refused():
    torch.manual_seed(0)
    quick = fastest(ReadsTwice(), X, forms=("folded", "channels_last"), tolerance=0.5, seconds=0.01)
    assert "something else" in quick.rejected["folded"]
    assert quick.errors["channels_last"] < 1e-5


@pytest.mark.parametrize("forms", [("folded",), ("channels_last",), ("bf16",), ("folded", "channels_last", "bf16")])
def test_the_result_agrees_and_says_what_it_is(forms):
    model = net().train()
    quick = fastest(model, X, forms=forms, tolerance=5e-2, seconds=0.01)
    assert isinstance(quick, Fastest) and quick.form in ("original", *forms)
    assert set(quick.seconds) == {"original", *forms} and not quick.rejected
    assert quick.form == min(quick.seconds, key=quick.seconds.get)
    assert model.training
    with torch.no_grad():
        for x in (X, torch.rand(3, 3, 8, 8)):
            y = quick(x)
            assert y.dtype == torch.float32 and y.shape == (len(x), 12)
            assert relative(y, model.eval()(x)) < 5e-2
    assert not quick(X.clone().requires_grad_()).requires_grad


def test_tolerance_rules_forms_out():
    quick = fastest(net(), X, forms=("folded", "bf16"), tolerance=1e-4, seconds=0.01)
    assert "differs by" in quick.rejected["bf16"] and quick.form in ("original", "folded")
    assert quick.errors["folded"] < 1e-4 < quick.errors["bf16"]
    quick = fastest(net(), X, forms=("bf16",), tolerance=0.0, seconds=0.01)
    assert quick.form == "original" and quick.errors["original"] == 0.0


def test_the_quickest_that_agrees_is_taken(monkeypatch):
    order = {"original": 3.0, "folded": 2.0, "channels_last": 1.0}
    monkeypatch.setattr(speed, "_times", lambda runs, inputs, seconds: {form: order[form] for form in runs})
    assert fastest(net(), X, forms=("folded", "channels_last")).form == "channels_last"
    assert fastest(net(), X, forms=("folded",)).form == "folded"


def test_without_a_compiler_the_rest_is_tried(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    quick = fastest(net(), X, seconds=0.01)
    assert quick.rejected["compiled"] == "RuntimeError: No working C++ compiler found"
    assert set(quick.seconds) >= {"original", "folded", "channels_last", "bf16"}


def test_control_flow_and_many_inputs_and_outputs():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), trained(nn.BatchNorm1d(4))

        def forward(self, x, index, flag):
            y = self.norm(self.layer(x))
            if y.sum() > 0:
                y = y * 2
            return {"y": y, "picked": y[index], "flag": flag}

    torch.manual_seed(0)
    model = Gate().eval()
    inputs = (torch.rand(5, 4), torch.tensor([1, 3]), True)
    quick = fastest(model, inputs, forms=("folded", "channels_last"), tolerance=1e-5, seconds=0.01)
    assert not quick.rejected
    with torch.no_grad():
        assert relative(quick(*inputs)["picked"], model(*inputs)["picked"]) < 1e-5


def test_nan_never_agrees():
    assert speed._difference(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert speed._difference(torch.ones(2), torch.ones(3)) == float("inf")
    assert speed._difference((torch.ones(2),), (torch.ones(2), torch.ones(2))) == float("inf")
    assert speed._difference(torch.tensor([1]), torch.tensor([2])) == 1.0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="forms has 'quick'"):
        fastest(net(), X, forms=("quick",))
    with pytest.raises(ValueError, match="tolerance is -1"):
        fastest(net(), X, tolerance=-1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")
def test_fastest_compiled_agrees():
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    quick = fastest(model, X, forms=("compiled",), tolerance=1e-4, seconds=0.01)
    if "compiled" in quick.rejected:
        pytest.skip(f"no compiled form here: {quick.rejected['compiled']}")
    assert quick.errors["compiled"] < 1e-4


def test_a_compiled_form_has_frozen_weights_for_every_shape():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU()).eval()
    run, module = speed._compiled(lambda x: model(x), model)
    for x in (X, torch.rand(2, 3, 12, 12)):
        try:
            with torch.inference_mode():
                run(x)
        except Exception as problem:
            pytest.skip(f"nothing can be compiled here: {problem}")
    wanted = [model(x) for x in (X, X[:2])]
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].bias.zero_()
    with torch.inference_mode():
        assert relative(run(X), wanted[0]) < 1e-4
        # A shape that was not seen while the weights were there: what is frozen now are the zeros.
        assert run(X[:2]).abs().max() == 0
