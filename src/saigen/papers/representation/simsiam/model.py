"""Exploring Simple Siamese Representation Learning (Chen & He, CVPR 2021, arXiv 2011.10566).

Two views x1, x2 of an image pass through one encoder f (backbone and projection MLP) and a prediction MLP h:
z = f(x), p = h(z). The negative cosine similarity D(p1, z2) is minimised with z2 taken as a constant: no negative
pairs, no momentum encoder, no large batch. The stop-gradient is what keeps the outputs from collapsing (section 4.1).

Below the method stand the tools with which the paper looks at it: the standard deviation that shows a collapse, the
k-NN classifier, the linear probe, and the augmentation that makes the views.
"""

import math
from collections import OrderedDict
from collections.abc import Callable

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from saigen.nn.resnet import resnet18, resnet50

# --- the heads (section 3, "baseline settings")


class ProjectionMLP(nn.Sequential):
    """The projection MLP: linear - BN - ReLU twice, then linear - BN without affine; (b, in_dim) to (b, dim).

    ``layers=2`` leaves out the middle, as for CIFAR (appendix D). The last linear keeps a bias that is not trained:
    the batch norm behind it takes any constant away, and official checkpoints have it.
    """

    def __init__(self, in_dim: int, dim: int = 2048, *, hidden_dim: int | None = None, layers: int = 3) -> None:
        if layers not in (2, 3):
            raise ValueError(f"layers is {layers}, allowed is 2 or 3")
        hidden_dim = in_dim if hidden_dim is None else hidden_dim
        if min(in_dim, hidden_dim, dim) < 1:
            raise ValueError(
                f"in_dim, hidden_dim, dim are {in_dim}, {hidden_dim}, {dim}, allowed is at least 1 for each"
            )
        modules: list[nn.Module] = []
        for width in [in_dim, hidden_dim][: layers - 1]:
            modules += [nn.Linear(width, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
        modules += [nn.Linear(hidden_dim, dim), nn.BatchNorm1d(dim, affine=False)]
        super().__init__(*modules)
        self[-2].bias.requires_grad_(False)


class PredictionMLP(nn.Sequential):
    """The prediction MLP h, a bottleneck: linear - BN - ReLU - linear, no BN at its output; (b, dim) to (b, dim)."""

    def __init__(self, dim: int = 2048, pred_dim: int = 512) -> None:
        if min(dim, pred_dim) < 1:
            raise ValueError(f"dim and pred_dim are {dim} and {pred_dim}, allowed is at least 1 for each")
        first = nn.Linear(dim, pred_dim, bias=False)
        super().__init__(first, nn.BatchNorm1d(pred_dim), nn.ReLU(inplace=True), nn.Linear(pred_dim, dim))


# --- the loss


def negative_cosine(p: Float[Tensor, "b d"], z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """D(p, stopgrad(z)): minus the mean cosine similarity, in [-1, 1]; no gradient flows into ``z`` (equations 1, 3).

    >>> negative_cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])).item()
    -1.0
    """
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def cross_entropy_similarity(p: Float[Tensor, "b d"], z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """D(p, stopgrad(z)) = -softmax(z) . log softmax(p), both over channels (section 4.5); at least the entropy of z."""
    return -(z.detach().softmax(1) * p.log_softmax(1)).sum(1).mean()


def simsiam_loss(
    p1: Float[Tensor, "_ _"],
    p2: Float[Tensor, "_ _"],
    z1: Float[Tensor, "_ _"],
    z2: Float[Tensor, "_ _"],
    *,
    symmetric: bool = True,
    similarity: str = "cosine",
) -> Float[Tensor, ""]:
    """L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2 (equation 4), a scalar; not symmetric: D(p1, stopgrad(z2)).

    Raises ``ValueError`` for an unknown ``similarity`` or where the shapes differ.

    >>> p, z = torch.randn(8, 4), torch.randn(8, 4)
    >>> bool(-1 <= simsiam_loss(p, p, z, z) <= 1)
    True
    """
    if not p1.shape == p2.shape == z1.shape == z2.shape:
        shapes = [tuple(t.shape) for t in (p1, p2, z1, z2)]
        raise ValueError(f"p1, p2, z1, z2 have shapes {shapes}, allowed are equal shapes")
    similarities = {"cosine": negative_cosine, "cross_entropy": cross_entropy_similarity}
    if similarity not in similarities:
        raise ValueError(f"similarity is {similarity!r}, allowed is 'cosine' or 'cross_entropy'")
    distance = similarities[similarity]
    if not symmetric:
        return distance(p1, z2)
    return 0.5 * (distance(p1, z2) + distance(p2, z1))


class SimSiamLoss(nn.Module):
    """``simsiam_loss`` as a module, for the four outputs of ``SimSiam``."""

    def __init__(self, *, symmetric: bool = True, similarity: str = "cosine") -> None:
        super().__init__()
        if similarity not in ("cosine", "cross_entropy"):
            raise ValueError(f"similarity is {similarity!r}, allowed is 'cosine' or 'cross_entropy'")
        self.symmetric, self.similarity = symmetric, similarity

    def forward(
        self, p1: Float[Tensor, "_ _"], p2: Float[Tensor, "_ _"], z1: Float[Tensor, "_ _"], z2: Float[Tensor, "_ _"]
    ) -> Float[Tensor, ""]:
        return simsiam_loss(p1, p2, z1, z2, symmetric=self.symmetric, similarity=self.similarity)


# --- the method


class SimSiam(nn.Module):
    """SimSiam around a backbone: two views (b, ...) to p1, p2, z1, z2, each (b, dim); z without gradient.

    ``backbone`` is any module that gives features (b, feature_dim). A classifier head in its way (``fc``,
    ``classifier`` or ``head``) is taken out, and its input size is ``feature_dim`` where none is given.
    ``proj_layers=3`` is the ImageNet form, 2 the CIFAR form; ``hidden_dim`` is ``feature_dim`` (official code) by
    default. Raises ``ValueError`` where ``feature_dim`` is needed and not given, or a size is below 1.

    >>> net = SimSiam(nn.Linear(16, 8), feature_dim=8, dim=32, pred_dim=8, proj_layers=2)
    >>> p1, p2, z1, z2 = net(torch.rand(4, 16), torch.rand(4, 16))
    >>> simsiam_loss(p1, p2, z1, z2).backward()
    """

    def __init__(
        self,
        backbone: nn.Module | Callable[[], nn.Module],
        *,
        feature_dim: int | None = None,
        dim: int = 2048,
        pred_dim: int = 512,
        hidden_dim: int | None = None,
        proj_layers: int = 3,
    ) -> None:
        super().__init__()
        self.backbone = backbone if isinstance(backbone, nn.Module) else backbone()
        feature_dim = _take_head_out(self.backbone, feature_dim)
        self.projector = ProjectionMLP(feature_dim, dim, hidden_dim=hidden_dim, layers=proj_layers)
        self.predictor = PredictionMLP(dim, pred_dim)
        self.feature_dim, self.dim = feature_dim, dim

    def encode(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """z = f(x), backbone and projection MLP."""
        return self.projector(self.backbone(x))

    def forward(
        self, x1: Float[Tensor, "b ..."], x2: Float[Tensor, "b ..."]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"], Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        # one view at a time: a joint batch would have other batch-norm statistics
        z1, z2 = self.encode(x1), self.encode(x2)
        return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()

    def param_groups(
        self, lr: float, batch_size: int = 256, *, fix_pred_lr: bool = True
    ) -> list[dict[str, list[Tensor] | float | bool | str]]:
        """Groups for ``torch.optim.SGD`` at lr * batch_size / 256, the paper's linear scaling (lr = 0.05).

        Two groups, "encoder" and "predictor"; with ``fix_pred_lr`` the predictor's has the key ``fix_lr`` true: its
        rate should stay when the other's decays (section 4.2: 68.1 against 67.7 %); ``decay`` does so.
        Frozen parameters are left out.
        """
        if lr <= 0 or batch_size < 1:
            raise ValueError(f"lr is {lr} and batch_size is {batch_size}, allowed are lr > 0 and batch_size >= 1")
        lr = lr * batch_size / 256
        encoder = [p for part in (self.backbone, self.projector) for p in part.parameters() if p.requires_grad]
        predictor = [p for p in self.predictor.parameters() if p.requires_grad]
        return [
            {"params": encoder, "lr": lr, "fix_lr": False, "name": "encoder"},
            {"params": predictor, "lr": lr, "fix_lr": fix_pred_lr, "name": "predictor"},
        ]

    @staticmethod
    def decay(optimizer: torch.optim.Optimizer, factor: float) -> None:
        """Sets each group's rate to ``factor`` times its first one, groups with ``fix_lr`` apart."""
        for group in optimizer.param_groups:
            initial = group.setdefault("initial_lr", group["lr"])
            group["lr"] = initial if group.get("fix_lr") else initial * factor

    @staticmethod
    def convert_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official checkpoints (``module.encoder.*`` with the projector in its ``fc``, ``module.predictor.*``) to ours."""
        converted = {}
        for key, value in state.items():
            key = key.removeprefix("module.")
            if key.startswith("encoder."):
                key = key.removeprefix("encoder.")
                key = "projector" + key.removeprefix("fc") if key.startswith("fc.") else f"backbone.{key}"
            converted[key] = value
        return converted


def _take_head_out(backbone: nn.Module, feature_dim: int | None) -> int:
    """Replaces the linear head of a known name by the identity; returns the number of features."""
    for name in ("fc", "classifier", "head"):
        head = getattr(backbone, name, None)
        if isinstance(head, nn.Linear):
            setattr(backbone, name, nn.Identity())
            feature_dim = head.in_features if feature_dim is None else feature_dim
    if feature_dim is None:
        feature_dim = getattr(backbone, "num_features", None)
    if feature_dim is None:
        raise ValueError(
            "feature_dim is None, allowed is the number of features of the backbone, which has no linear head"
        )
    return feature_dim


# --- how to look at it


def collapse_std(z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """The standard deviation of z / ||z|| over the batch, mean over channels: 1 / sqrt(d) for spread outputs, 0 collapsed.

    Section 4.1, figure 2 (middle).
    """
    return F.normalize(z.float(), dim=1).std(0, correction=0).mean()


def spread_std(dim: int) -> float:
    """What ``collapse_std`` is for outputs spread over all directions of ``dim`` dimensions: 1 / sqrt(dim)."""
    return 1 / math.sqrt(dim)


def knn_accuracy(
    train_z: Float[Tensor, "n d"],
    train_y: Int[Tensor, " n"],
    test_z: Float[Tensor, "m d"],
    test_y: Int[Tensor, " m"],
    *,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> float:
    """The accuracy of the k-NN monitor: the k most similar train features vote with weight exp(cosine / temperature).

    Use the backbone's features, not z. Raises ``ValueError`` unless 1 <= k <= n and temperature > 0.
    """
    if not 1 <= k <= len(train_z):
        raise ValueError(f"k is {k}, allowed is 1 <= k <= {len(train_z)}, the number of train features")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, allowed is temperature > 0")
    train_z, test_z = F.normalize(train_z.float(), dim=1), F.normalize(test_z.float(), dim=1)
    classes, right = int(train_y.max()) + 1, 0
    for part, labels in zip(test_z.split(chunk), test_y.split(chunk), strict=True):
        similarity, neighbours = (part @ train_z.T).topk(k, dim=1)
        # a common factor exp(-1 / temperature) keeps small temperatures from overflowing
        weights = ((similarity - 1) / temperature).exp()
        votes = weights.new_zeros(len(part), classes).scatter_add_(1, train_y[neighbours], weights)
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test_y)


def linear_probe(
    train_z: Float[Tensor, "n d"],
    train_y: Int[Tensor, " n"],
    test_z: Float[Tensor, "m d"],
    test_y: Int[Tensor, " m"],
    *,
    l2: float = 1e-3,
    max_iter: int = 200,
) -> float:
    """The accuracy of a linear classifier on frozen features (standardised by the train part), solved to convergence.

    Multinomial logistic regression by L-BFGS: the optimum that the paper's ninety epochs of LARS walk towards, without
    its learning rate to tune. ``l2`` is the weight of half the squared norm of the classifier's weight.
    """
    if l2 < 0:
        raise ValueError(f"l2 is {l2}, allowed is l2 >= 0")
    mean, std = train_z.mean(0), train_z.std(0, correction=0)
    # dead channels of a collapsed encoder carry rounding noise only
    scale = torch.where(std > 1e-6 * (1 + mean.abs()), 1 / std.clamp_min(1e-30), 0)
    train_z, test_z = (train_z - mean) * scale, (test_z - mean) * scale
    classes = int(train_y.max()) + 1
    weight = train_z.new_zeros(classes, train_z.shape[1], requires_grad=True)
    bias = train_z.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=max_iter, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(train_z, weight, bias), train_y) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    prediction = F.linear(test_z, weight, bias).argmax(1)
    return (prediction == test_y).double().mean().item()


# --- the views


class TwoViews(nn.Module):
    """Two random views of each image of a batch (b, 3, h, w) in [0, 1], by the augmentation of MoCo v2.

    Crop of 0.2-1 of the area, flip 0.5, colour jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, grey 0.2, Gaussian
    blur 0.5 with a deviation of 0.1-2 pixels at 224; ``blur=False`` is the CIFAR form (appendix D). ``size`` is the
    side of the views. With a ``generator`` the global random state is left alone and the views are a function of it.
    Normalise afterwards.

    >>> x1, x2 = TwoViews(32, blur=False)(torch.rand(2, 3, 40, 40), generator=torch.Generator().manual_seed(0))
    >>> x1.shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, size: int = 224, *, blur: bool = True, min_scale: float = 0.2) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size is {size}, allowed is size >= 1")
        if not 0 < min_scale <= 1:
            raise ValueError(f"min_scale is {min_scale}, allowed is 0 < min_scale <= 1")
        steps: OrderedDict[str, nn.Module] = OrderedDict(
            crop=K.RandomResizedCrop(
                (size, size), scale=(min_scale, 1.0), align_corners=False, cropping_mode="resample"
            ),
            flip=K.RandomHorizontalFlip(p=0.5),
            jitter=K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            grey=K.RandomGrayscale(p=0.2),
        )
        if blur:
            # three deviations to each side at the largest blur
            side = 2 * math.ceil(3 * 2.0 * size / 224 / 2) + 1
            steps["blur"] = K.RandomGaussianBlur((side, side), (0.1 * size / 224, 2.0 * size / 224), p=0.5)
        self.steps = nn.Sequential(steps)

    def forward(
        self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, "b 3 s s"]]:
        if generator is None:
            return self.steps(x), self.steps(x)
        # kornia draws from the global stream; lend it one seeded by the generator
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return self.steps(x), self.steps(x)


# --- the paper's two networks


def simsiam_resnet50(*, dim: int = 2048, pred_dim: int = 512) -> SimSiam:
    """The ImageNet setting (section 3): ResNet-50 and the three-layer projector; 38,201,408 parameters."""
    return SimSiam(resnet50(num_classes=0), dim=dim, pred_dim=pred_dim)


def simsiam_cifar_resnet18(*, dim: int = 2048, pred_dim: int = 512) -> SimSiam:
    """The CIFAR setting (appendix D): ResNet-18 with a 3x3 stem and the two-layer projector."""
    return SimSiam(resnet18(num_classes=0, small_stem=True), dim=dim, pred_dim=pred_dim, hidden_dim=dim, proj_layers=2)
