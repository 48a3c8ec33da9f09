"""The small network of the official example, whose three convolutions are the layers that are entangled."""

from jaxtyping import Float
from torch import Tensor, nn

from saigen.nn.classifier import Classifier


class EntangledCNN(Classifier):
    """The network of the official example: three convolutions and a linear layer, on square images of an even side.

    Layers ``conv1``, ``conv2``, ``conv3`` (each with its ReLU) are the hidden ones. 28 pixels give 14x14x64, 5x5x128 and
    1x1x128 activations.
    """

    classifier_name = "classifier"

    def __init__(self, *, num_classes: int = 10, in_chans: int = 1, image_size: int = 28, width: int = 64) -> None:
        super().__init__()
        side = ((image_size - 2) // 2 + 1 - 6) // 2 + 1 - 4 if image_size % 2 == 0 else 0
        if side < 1:
            raise ValueError(f"image_size is {image_size}, allowed are even sides of at least 28")
        for name, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1), ("width", width, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}, allowed is {name} >= {least}")
        self.num_classes, self.num_features = num_classes, 2 * width * side * side
        self.default_cfg = {
            "input_size": (in_chans, image_size, image_size), "mean": (0.0,) * in_chans, "std": (1.0,) * in_chans,
            "interpolation": "bilinear", "crop_pct": 1.0,
        }  # fmt: skip
        # TensorFlow's "same" padding of an even side is 3 on each.
        self.conv1 = nn.Sequential(nn.Conv2d(in_chans, width, 8, stride=2, padding=3), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(width, 2 * width, 6, stride=2), nn.ReLU())
        self.conv3 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 5), nn.ReLU())
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.conv3(self.conv2(self.conv1(x)))

    def forward_head(self, x: Float[Tensor, "b d h w"], pre_logits: bool = False) -> Float[Tensor, "b k"]:
        x = x.flatten(1)
        return x if pre_logits else self.classifier(x)

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our layout is the only one there is; a ``module.`` in front is taken off."""
        return {name.removeprefix("module."): value for name, value in state.items()}


def entangled_cnn(*, num_classes: int = 10, in_chans: int = 1, image_size: int = 28, width: int = 64) -> EntangledCNN:
    """The official example's network; 710,218 parameters for MNIST."""
    return EntangledCNN(num_classes=num_classes, in_chans=in_chans, image_size=image_size, width=width)
