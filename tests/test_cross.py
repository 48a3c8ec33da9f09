"""Any method of the list works with any model of the list: each pair trains, its loss falls, and it resumes exactly."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

from saigen import cross
from saigen.cli import app
from saigen.cross import Cell, markdown, pairs
from saigen.data import digits
from saigen.train import fit
from saigen.trial import Trial

PAIRS = [(model, method) for model in cross.entries("model") for method in (None, *cross.entries("method"))]


@pytest.fixture(scope="module")
def batch():
    images = digits()
    x = torch.nn.functional.interpolate(images.x[:40], (16, 16), mode="bilinear", align_corners=False)
    return x, images.y[:40]


def a_recipe(model, method):
    """None where the method cannot be had with the model, which it must have said."""
    of_this = (Trial(0, "tiny"), model), (cross.SIZES["tiny"], (4,) * 10, 1)
    plain = cross.recipe(*of_this[0], None, *of_this[1])
    try:
        return plain if method is None else cross.recipe(*of_this[0], method, *of_this[1])
    except ValueError as error:
        assert "allowed" in str(error)
        return None


def train(how, batch, steps, checkpoint=None):
    fit(
        how.model, how.loss, batch, optimizer=how.optimizer(how.model, 3e-3), steps=steps, batch_size=20, seed=1,
        transform=how.transform, checkpoint=checkpoint,
    )  # fmt: skip
    return how.model


def loss_of(how, batch):
    """What is trained, of both halves of the batch as training sees them."""
    torch.manual_seed(0)
    x, y = how.transform(torch.Generator().manual_seed(0), *batch)
    return how.loss(copy.deepcopy(how.model).train(), x, y).item()


@pytest.mark.parametrize(
    ("model", "method"), PAIRS, ids=[f"{model.name}-{method.name if method else 'plain'}" for model, method in PAIRS]
)
def test_a_pair_learns_and_resumes_exactly(model, method, batch, tmp_path):
    how = a_recipe(model, method)
    if how is None:
        return
    before = loss_of(how, batch)
    whole = train(how, batch, 8)
    assert loss_of(how, batch) < before
    train(a_recipe(model, method), batch, 4, tmp_path / "state.pt")
    broken = train(a_recipe(model, method), batch, 8, tmp_path / "state.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[name]), name


def run(*arguments):
    return CliRunner().invoke(app, ["cross", *arguments], catch_exceptions=True)


def test_the_command_measures_keeps_and_draws(store, tmp_path):
    asked = ["--models", "vit,channel_equilibrium", "--methods", "AdvProp,SAM", "--scale", "tiny", "--seeds", "2"]
    first = run(*asked, "--jobs", "1", "--out", str(tmp_path / "out"), "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert [(pair["model"], pair["method"]) for pair in found["pairs"]] == [
        ("ce_resnet", "AdvProp"), ("ce_resnet", "SAM"), ("vit", "AdvProp"), ("vit", "SAM"),
    ]  # fmt: skip
    by_pair = {(pair["model"], pair["method"]): pair for pair in found["pairs"]}
    assert "batch norm" in by_pair["vit", "AdvProp"]["missing"]
    arms = {(arm["model"], arm["method"], arm["seed"]): arm["accuracy"] for arm in found["arms"]}
    gain = sum(arms["ce_resnet", "SAM", seed] - arms["ce_resnet", None, seed] for seed in (0, 1)) / 2
    assert by_pair["ce_resnet", "SAM"]["gain"]["mean"] == pytest.approx(gain)
    table = (tmp_path / "out" / "cross.md").read_text(encoding="utf-8")
    assert "| vit |" in table and "| - |" in table and "(cross.svg)" in table
    assert "saigen cross --models vit,channel_equilibrium --methods AdvProp,SAM --scale tiny --seeds 2" in table
    assert (tmp_path / "out" / "cross.svg").read_text(encoding="utf-8").startswith("<svg")

    kept = {path: path.stat().st_mtime_ns for path in (store / "cross").iterdir()}
    again = run(*asked, "--out", str(tmp_path / "again"), "--json")
    assert again.stdout == first.stdout and "12 of them measured before" in again.stderr
    assert kept == {path: path.stat().st_mtime_ns for path in (store / "cross").iterdir()}


def test_bold_is_what_tells_from_nothing():
    gains = {"up": (0.02, 0.03, 0.025), "down": (-0.02, -0.03, -0.025), "either": (0.02, -0.03, 0.01)}
    cells = [Cell("net", None, seed, 0.5) for seed in range(3)]
    cells += [Cell("net", method, seed, 0.5 + gain[seed]) for method, gain in gains.items() for seed in range(3)]
    cells += [Cell("net", "none", seed, missing="it needs batch norm") for seed in range(3)]
    table = markdown(pairs(cells), 3, "laptop", "Measured.", "cross.svg")
    assert table.count("**+2.5 ± ") == 1 and table.count("**-2.5 ± ") == 1 and "| +0.0 ± " in table
    assert "2 of 3 pairs" in table and table.splitlines()[-3].endswith("| - |")


def test_names_are_listed():
    listed = run("--list", "--models", "sam").stdout
    assert "sam_mixer" in listed and "RandAugment" in listed and "efficientnet_v2" not in listed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "vitt"], "vit"),
        (["--methods", "Sam"], "SAM"),
        (["--scale", "full"], "scale is 'full'"),
        (["--scale", "real"], "--data"),
        (["--scale", "real", "--data", "no/such/folder"], "nothing there"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, said):
    failed = run(*arguments)
    assert isinstance(failed.exception, ValueError) and said in str(failed.exception)
