"""The subjects of the study, small: a class-conditional GAN, a VQ-VAE with a prior, an autoregressive model; and ResNet-56.

Each ``sample(labels, generator)`` gives images (n, C, H, W) in [0, 1]. The GAN has the projection discriminator and hinge
loss of BigGAN, the autoregressive model masked convolutions, the VQ-VAE a codebook kept by moving averages and the same
autoregressive model as its prior, as in VQ-VAE-2 with one level.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from saigen.nn.cifar_resnet import CifarResNet


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}, allowed is {least} or more")


# GAN ----------------------------------------------------------------------------------------------------------------


class ConditionalNorm(nn.Module):
    """Batch normalisation whose scale and shift come from the class."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Embedding(num_classes, channels)
        self.shift = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        return self.norm(x) * self.scale(y)[:, :, None, None] + self.shift(y)[:, :, None, None]


class Generator(nn.Module):
    """From noise (n, latent) and labels (n,) to images in [0, 1]: up-sampling by 2 from a quarter of the side."""

    def __init__(
        self, num_classes: int = 10, channels: int = 1, size: int = 8, width: int = 64, latent: int = 32
    ) -> None:
        super().__init__()
        if size % 4:
            raise ValueError(f"size is {size}, allowed are multiples of 4")
        _at_least("num_classes", num_classes, 1)
        self.latent, self.side, self.num_classes = latent, size // 4, num_classes
        self.start = nn.Linear(latent, width * self.side**2)
        self.norms = nn.ModuleList([ConditionalNorm(width, num_classes) for _ in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.to_image = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "n z"], y: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        x = self.start(z).view(len(z), -1, self.side, self.side)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = conv(F.interpolate(F.relu(norm(x, y)), scale_factor=2.0))
        return torch.sigmoid(self.to_image(F.relu(self.norms[-1](x, y))))

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator, *, truncation: float | None = None) -> Tensor:
        """One image a label; with ``truncation`` the noise is redrawn until within that many standard deviations of 0."""
        if truncation is not None and truncation <= 0:
            raise ValueError(f"truncation is {truncation}, allowed is above 0, or None")
        self.eval()
        z = torch.randn(len(labels), self.latent, generator=generator)
        if truncation is not None:
            # The inverse of the normal distribution's function, between its values at the two ends.
            low = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
            u = torch.rand(z.shape, generator=generator, dtype=torch.float64)
            z = torch.special.ndtri(low + (1 - 2 * low) * u).float()
        return self(z.to(labels.device), labels)


class Discriminator(nn.Module):
    """Real or not, given the class: psi(phi(x)) + <embedding of y, phi(x)> (projection), spectral norm throughout."""

    def __init__(self, num_classes: int = 10, channels: int = 1, width: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(
            spectral_norm(nn.Conv2d(channels, width, 3, padding=1)),
            nn.LeakyReLU(0.1),
            spectral_norm(nn.Conv2d(width, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.1),
            spectral_norm(nn.Conv2d(width, width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.1),
        )
        self.real = spectral_norm(nn.Linear(width, 1))
        self.of_class = spectral_norm(nn.Embedding(num_classes, width))

    def forward(self, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        phi = self.features(x).sum(dim=(2, 3))
        return self.real(phi)[:, 0] + (self.of_class(y) * phi).sum(dim=1)


def discriminator_loss(on_real: Float[Tensor, " n"], on_fake: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """The hinge loss: E max(0, 1 - D(real)) + E max(0, 1 + D(fake))."""
    return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()


# Autoregressive ---------------------------------------------------------------------------------------------------------


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees only what comes before in raster order; ``own`` lets it see the pixel itself as well."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, *, own: bool) -> None:
        super().__init__(channels, out_channels, kernel_size, padding=kernel_size // 2)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, allowed are odd sizes")
        mask = torch.ones(kernel_size, kernel_size)
        mask[kernel_size // 2, kernel_size // 2 + own :] = 0
        mask[kernel_size // 2 + 1 :] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o h w"]:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class PixelCNN(nn.Module):
    """p(grid | class) = prod p(cell | cells before, class), cells of ``levels`` values, by masked convolutions.

    ``forward`` takes the first rows of grids, or all, and gives logits (n, levels, h, w); their cross entropy with the grid is the negative log-likelihood.
    """

    def __init__(self, num_classes: int = 10, levels: int = 17, size: int = 8, width: int = 64, depth: int = 5) -> None:
        super().__init__()
        for name, value, least in (
            ("levels", levels, 2),
            ("size", size, 1),
            ("depth", depth, 1),
            ("num_classes", num_classes, 1),
        ):
            _at_least(name, value, least)
        self.levels, self.size = levels, size
        self.of_level = nn.Embedding(levels, width)
        self.first = MaskedConv2d(width, width, 5, own=False)
        self.convs = nn.ModuleList([MaskedConv2d(width, 2 * width, 3, own=True) for _ in range(depth)])
        self.of_class = nn.ModuleList([nn.Embedding(num_classes, 2 * width) for _ in range(depth)])
        # Where a cell is: convolutions alone cannot tell the middle of an image from its border.
        self.of_place = nn.Parameter(torch.zeros(width, size, size))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, levels, 1))

    def forward(self, grid: Int[Tensor, "n h w"], y: Int[Tensor, " n"]) -> Float[Tensor, "n l h w"]:
        x = self.first(self.of_level(grid).permute(0, 3, 1, 2)) + self.of_place[:, : grid.shape[1]]
        for conv, of_class in zip(self.convs, self.of_class, strict=True):
            value, gate = (conv(x) + of_class(y)[:, :, None, None]).chunk(2, dim=1)
            x = x + torch.tanh(value) * torch.sigmoid(gate)
        return self.head(x)

    def loss(self, grid: Int[Tensor, "n h w"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """The mean negative log-likelihood of a cell, in nats."""
        return F.cross_entropy(self(grid, y), grid)

    @torch.no_grad()
    def sample_grid(self, labels: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, "n h w"]:
        """One grid a label, cell by cell."""
        self.eval()
        grid = torch.zeros(len(labels), self.size, self.size, dtype=torch.long, device=labels.device)
        for row in range(self.size):
            for column in range(self.size):
                # Nothing below the row is looked at.
                p = self(grid[:, : row + 1], labels)[:, :, row, column].softmax(dim=1)
                grid[:, row, column] = torch.multinomial(p.cpu(), 1, generator=generator)[:, 0].to(grid.device)
        return grid

    @torch.no_grad()
    def sample(self, labels: Int[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, "n 1 h w"]:
        """One grey image a label: the levels as greys from 0 to 1."""
        return self.sample_grid(labels, generator)[:, None].float() / (self.levels - 1)

    def to_grid(self, x: Float[Tensor, "n 1 h w"]) -> Int[Tensor, "n h w"]:
        """Grey images in [0, 1] as levels."""
        return (x[:, 0] * (self.levels - 1)).round().long().clamp(0, self.levels - 1)


# VQ-VAE -------------------------------------------------------------------------------------------------------------


class VQVAE(nn.Module):
    """Images as a grid of codes, half the side, and back; the codebook follows its vectors by moving averages.

    ``forward`` gives the reconstruction, the codes (n, h/2, w/2) and the commitment loss |z - e|^2. In training mode it
    also moves the codebook; a code that is hardly used is put where an encoded vector is.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 64,
        codes: int = 64,
        dim: int = 16,
        *,
        decay: float = 0.95,
        commitment: float = 0.25,
    ) -> None:
        super().__init__()
        _at_least("codes", codes, 2)
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}, allowed is 0 <= decay < 1")
        self.decay, self.commitment, self.codes = decay, commitment, codes
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, dim, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1),
        )  # fmt: skip
        self.register_buffer("codebook", torch.randn(codes, dim))
        self.register_buffer("uses", torch.ones(codes))
        self.register_buffer("sums", self.codebook.clone())

    def nearest(self, z: Float[Tensor, "n d h w"]) -> Int[Tensor, "n h w"]:
        """The nearest code of each vector."""
        vectors = z.permute(0, 2, 3, 1)
        return torch.cdist(vectors.flatten(0, 2), self.codebook).argmin(dim=1).view(vectors.shape[:3])

    def encode(self, x: Float[Tensor, "n c h w"]) -> Int[Tensor, "n a b"]:
        """Images as codes."""
        return self.nearest(self.encoder(x))

    def decode(self, codes: Int[Tensor, "n a b"]) -> Float[Tensor, "n c h w"]:
        """Codes as images in [0, 1]."""
        return torch.sigmoid(self.decoder(self.codebook[codes].permute(0, 3, 1, 2)))

    def forward(self, x: Float[Tensor, "n c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x)
        codes = self.nearest(z.detach())
        e = self.codebook[codes].permute(0, 3, 1, 2)
        if self.training:
            self._move(z.detach().permute(0, 2, 3, 1).flatten(0, 2), codes.flatten())
        passed = z + (e - z).detach()  # straight through: the decoder's gradient reaches the encoder as it is
        return torch.sigmoid(self.decoder(passed)), codes, (z - e.detach()).square().mean()

    @torch.no_grad()
    def _move(self, vectors: Tensor, codes: Tensor) -> None:
        chosen = F.one_hot(codes, self.codes).to(vectors.dtype)
        self.uses.lerp_(chosen.sum(dim=0), 1 - self.decay)
        self.sums.lerp_(chosen.T @ vectors, 1 - self.decay)
        idle = self.uses < 0.05
        fresh = vectors[torch.randint(len(vectors), (self.codes,), device=vectors.device)]
        self.sums.copy_(torch.where(idle[:, None], fresh, self.sums))
        self.uses.copy_(torch.where(idle, torch.ones_like(self.uses), self.uses))
        self.codebook.copy_(self.sums / self.uses[:, None])

    def loss(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        """Squared error of the reconstruction and ``commitment`` times the commitment loss."""
        reconstruction, _, committed = self(x)
        return F.mse_loss(reconstruction, x) + self.commitment * committed


class VQVAESampler(nn.Module):
    """A VQ-VAE whose codes are drawn from an autoregressive prior given the class."""

    def __init__(self, autoencoder: VQVAE, prior: PixelCNN) -> None:
        super().__init__()
        if prior.levels != autoencoder.codes:
            raise ValueError(
                f"prior has {prior.levels} levels, the autoencoder {autoencoder.codes} codes: they must be as many"
            )
        self.autoencoder, self.prior = autoencoder, prior

    @torch.no_grad()
    def sample(self, labels: Int[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
        """One image a label."""
        return self.autoencoder.decode(self.prior.sample_grid(labels, generator))

    @torch.no_grad()
    def reconstruct(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Encoded and decoded: the control that tells the decoder's loss from the prior's."""
        return self.autoencoder.decode(self.autoencoder.encode(x))


# The fixed classifier -----------------------------------------------------------------------------------------------


def cas_resnet56(*, num_classes: int = 10, in_chans: int = 3) -> CifarResNet:
    """The fixed classifier of the CIFAR-10 study: ResNet-56 (He et al.), 853,018 parameters."""
    return CifarResNet(56, num_classes=num_classes, in_chans=in_chans)
