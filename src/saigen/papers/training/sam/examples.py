"""Small instances of SAM and of the paper's two kinds of model; the benchmarks beside pytorch_optimizer and timm."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from saigen.example import Benchmark, Example, Part, Recipe
from saigen.papers.training.sam import SAM, hessian_top_eigenvalue, sam_mixer_s16_224, sam_vit_small_patch16_224

_TINY = {"img_size": 32, "num_classes": 5}


def _images(generator: torch.Generator) -> tuple[torch.Tensor]:
    return (torch.rand(2, 3, 32, 32, generator=generator),)


def _with_a_head(model: nn.Module) -> nn.Module:
    # the head starts at zero: without weights every image would give the same logits
    nn.init.normal_(model.head.weight, std=0.02)
    return model


def examples():
    yield Example(
        name="SAM",
        kind="optimizer",
        make=lambda params: SAM(params, torch.optim.AdamW, rho=0.1, lr=1e-2, weight_decay=0.1),
        code="""
import torch
from saigen.papers.training.sam import SAM

net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
optimizer = SAM(net.parameters(), torch.optim.AdamW, rho=0.1, model=net, lr=1e-3, weight_decay=0.3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
x, y = torch.randn(256, 20), torch.randint(3, (256,))

def closure():                       # called twice a step: at w, and at w + eps
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(net(x), y)
    loss.backward()
    return loss

for step in range(100):
    loss = optimizer.step(closure)   # the loss at w
    schedule.step()
""",
        wrong=(
            (lambda: SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=-1.0, lr=0.1), "rho"),
            (lambda: SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, max_grad_norm=0.0, lr=0.1), "max_grad_norm"),
            (lambda: SAM([nn.Parameter(torch.ones(2))], "SGD"), "base_optimizer"),
            (lambda: SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1).step(), "closure"),
        ),
    )
    yield Example(
        name="ASAM",
        kind="optimizer",
        make=lambda params: SAM(params, torch.optim.SGD, rho=0.5, adaptive=True, lr=0.1, momentum=0.9, nesterov=True),
        code="""
import torch
from saigen.papers.training.sam import SAM

net = torch.nn.Linear(10, 2)
optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, lr=0.1, momentum=0.9, nesterov=True)
x, y = torch.randn(64, 10), torch.randint(2, (64,))

def closure():
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(net(x), y)
    loss.backward()
    return loss

for step in range(20):
    optimizer.step(closure)
""",
    )
    yield Example(
        name="sam_vit_small_patch16_224",
        kind="module",
        make=lambda: _with_a_head(sam_vit_small_patch16_224(**_TINY, embed_dim=48, depth=2, num_heads=3)),
        inputs=_images,
        code="""
import torch
import saigen

model = saigen.create_model("sam_vit_small_patch16_224", num_classes=10)   # weights="…npz": the official checkpoint
image = torch.rand(1, 3, 224, 224)
with torch.no_grad():
    logits = model((image - 0.5) / 0.5)                                    # images come scaled to [-1, 1]
""",
        wrong=(
            (lambda: sam_vit_small_patch16_224(img_size=30), "img_size"),
            (lambda: sam_vit_small_patch16_224(num_classes=-1), "num_classes"),
        ),
    )
    yield Example(
        name="sam_mixer_s16_224",
        kind="module",
        make=lambda: _with_a_head(sam_mixer_s16_224(**_TINY, embed_dim=48, depth=2)),
        inputs=_images,
        code="""
import torch
import saigen

model = saigen.create_model("sam_mixer_s16_224", num_classes=10)
with torch.no_grad():
    logits = model(torch.rand(1, 3, 224, 224) * 2 - 1)
""",
        wrong=((lambda: sam_mixer_s16_224(img_size=100), "img_size"), (lambda: sam_mixer_s16_224(depth=0), "depth")),
    )
    yield Example(
        name="hessian_top_eigenvalue",
        kind="function",
        make=lambda: _curvature,
        inputs=lambda generator: (torch.randn(16, 4, generator=generator), torch.arange(16) % 3, generator),
        code="""
import torch
from saigen.papers.training.sam import hessian_top_eigenvalue, loss_surface

net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
x, y = torch.randn(64, 4), torch.randint(3, (64,))
loss = lambda: torch.nn.functional.cross_entropy(net(x), y)

top = hessian_top_eigenvalue(loss, net.parameters())             # top.value, top.vector, top.converged
at, surface = loss_surface(loss, net.parameters(), steps=11)     # L(w + a d1 + b d2), filter-normalised directions
""",
        wrong=((lambda: hessian_top_eigenvalue(lambda: torch.zeros(()), []), "params"),),
        batch=None,
    )


def _curvature(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    weight = torch.full((3, 4), 0.1, requires_grad=True)
    found = hessian_top_eigenvalue(lambda: F.cross_entropy(x @ weight.T, y), [weight], generator=generator)
    return torch.tensor(found.value)


def parts() -> Iterator[Part]:
    yield Part(
        "sam_vit",
        "model",
        lambda classes, channels, side: sam_vit_small_patch16_224(
            img_size=side,
            patch_size=side // 8,
            embed_dim=48,
            depth=2,
            num_heads=3,
            num_classes=classes,
            in_chans=channels,
        ),
    )
    yield Part(
        "sam_mixer",
        "model",
        lambda classes, channels, side: sam_mixer_s16_224(
            img_size=side, patch_size=side // 8, embed_dim=48, depth=2, num_classes=classes, in_chans=channels
        ),
    )
    for name, rho, adaptive in (("SAM", 0.05, False), ("ASAM", 0.5, True)):
        yield Part(name, "method", partial(_sharpness_aware, rho=rho, adaptive=adaptive))


def _sharpness_aware(recipe: Recipe, rho: float, adaptive: bool) -> Recipe:
    return replace(
        recipe,
        optimizer=lambda model, rate: SAM(
            model.parameters(), torch.optim.AdamW, rho=rho, adaptive=adaptive, model=model, lr=rate, weight_decay=0.05
        ),
    )


def benchmarks():
    for base in ("AdamW", "SGD"):
        yield Benchmark(
            name=f"SAM step around {base}, Mixer of 2.3 M parameters, batch 2",
            ours=_step_of("ours", base),
            peer=_step_of("pytorch_optimizer", base),
        )
    for name in ("mixer_s32_224", "mixer_s16_224"):
        for backward in (False, True):
            yield Benchmark(
                name=f"{name} {'forward and backward' if backward else 'forward'}, batch 8",
                ours=_mixer_of("ours", name, backward),
                peer=_mixer_of("timm", name, backward),
            )


def _step_of(whose: str, base: str) -> Callable[[], Callable[[], Any]]:
    """One whole SAM step (both passes and the update); the same network, batch and base optimizer."""

    def build() -> Callable[[], Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = sam_mixer_s16_224(img_size=64, embed_dim=256, depth=4, num_classes=10)
            x, y = torch.rand(2, 3, 64, 64), torch.arange(2)
        arguments = {"rho": 0.1, "lr": 1e-4, "weight_decay": 0.1}
        if whose == "ours":
            optimizer = SAM(net.parameters(), getattr(torch.optim, base), **arguments)
        else:
            from pytorch_optimizer import SAM as PeerSAM

            optimizer = PeerSAM(net.parameters(), getattr(torch.optim, base), **arguments)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        def peer_step() -> Any:
            closure()  # the peer's step makes the second pass only
            return optimizer.step(closure)

        return (lambda: optimizer.step(closure)) if whose == "ours" else peer_step

    return build


def _mixer_of(whose: str, name: str, backward: bool) -> Callable[[], Callable[[], Any]]:
    """The same weights and images; both with the exact GELU."""

    def build() -> Callable[[], Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            from saigen.papers.training import sam

            model = getattr(sam, f"sam_{name}")(gelu="none")
            x = torch.rand(8, 3, 224, 224)
        if whose == "timm":
            import timm

            peer = timm.create_model(name)
            peer.load_state_dict(model.state_dict())
            model = peer
        model.eval()

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                return model(x)

        def both() -> None:
            model.zero_grad()
            model(x).square().mean().backward()

        return both if backward else forward

    return build
