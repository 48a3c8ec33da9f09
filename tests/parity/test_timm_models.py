"""saigen's models through timm's front door."""

import subprocess
import sys
import warnings

import pytest
import torch

import saigen
from tests.peers import need

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def timm():
    timm = need("timm")
    import saigen.timm_models  # noqa: F401

    return timm


def test_every_model_is_registered_once_and_timms_own_are_as_they_were(timm):
    from saigen.timm_models import register

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # timm warns where a name is taken
        names = register()
    assert names == [f"saigen_{name}" for name in saigen.list_models()]
    assert set(names) == set(timm.list_models("saigen_*")) == set(timm.list_models(module="timm_models"))
    assert type(timm.create_model("efficientnet_b0")).__module__.startswith("timm.")


def test_the_arguments_arrive(timm):
    model = timm.create_model("saigen_efficientnet_b0", num_classes=7, in_chans=1, drop_path_rate=None).eval()
    assert type(model) is type(saigen.create_model("efficientnet_b0"))
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 7)
    assert model.get_classifier().out_features == model.num_classes == 7


def test_rates_that_are_off_do_no_harm_and_others_are_named(timm):
    timm.create_model("saigen_rednet26", drop_block_rate=0.0)
    with pytest.raises(ValueError, match="no argument 'drop_block_rate'"):
        timm.create_model("saigen_rednet26", drop_block_rate=0.1)


def test_timms_weights_by_every_way_that_timm_knows(timm, tmp_path):
    from safetensors.torch import save_file

    theirs = timm.create_model("efficientnet_b0", num_classes=5).eval()
    path = str(tmp_path / "model.safetensors")
    save_file(theirs.state_dict(), path)
    x = torch.rand(2, 3, 64, 64)
    for given in (
        {"checkpoint_path": path, "num_classes": 5},
        {"weights": path},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": path}},
    ):
        ours = timm.create_model("saigen_efficientnet_b0", **given).eval()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_the_preprocessing_that_timm_reads(timm):
    from timm.data import resolve_model_data_config

    ours = resolve_model_data_config(timm.create_model("saigen_efficientnet_b0"))
    theirs = resolve_model_data_config(timm.create_model("efficientnet_b0"))
    assert {key: ours[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")} == {
        key: theirs[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")
    }


def test_weights_that_are_not_there_are_one_sentence(timm):
    with pytest.raises(ValueError, match="no weights of its own"):
        timm.create_model("saigen_efficientnet_b0", pretrained=True)
    with pytest.raises(ValueError, match="have no tags"):
        timm.create_model("saigen_efficientnet_b0.ra_in1k")


@pytest.mark.parametrize("name", ["saigen/efficientnet_b0", "saigen:efficientnet_b0"])
def test_why_the_names_have_an_underscore(timm, name):
    with pytest.raises(ValueError):
        timm.create_model(name)


def test_the_front_door_leaves_timm_alone():
    code = "import sys, saigen; saigen.create_model('efficientnet_b0'); sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
