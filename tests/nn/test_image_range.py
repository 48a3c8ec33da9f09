import pytest
import torch

from saigen.nn.image_range import check_unit_range


@pytest.mark.parametrize(
    "x", [torch.rand(2, 3, 4, 4), torch.tensor([-0.1, 1.2]), torch.empty(0), torch.full((2,), 255)]
)
def test_images_pass(x):
    check_unit_range(x)


@pytest.mark.parametrize(
    ("x", "seen"),
    [
        (torch.tensor([0.0, 255.0]), "from 0 to 255"),
        (torch.tensor([-2.1, 2.6]), "from -2.1 to 2.6"),
        (torch.tensor([0.0, torch.nan]), "from nan to nan"),
        (torch.tensor([0.0, torch.inf]), "to inf"),
    ],
)
def test_bytes_normalised_images_and_nan_do_not(x, seen):
    with pytest.raises(ValueError, match=rf"x holds values .*{seen}.*divide bytes by 255"):
        check_unit_range(x)
