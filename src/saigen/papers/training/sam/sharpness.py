"""How sharp a minimum is and what it looks like: the measures of section 3 of "When Vision Transformers Outperform …".

The dominant Hessian eigenvalue λ_max (of the whole network and of single blocks), the loss under Gaussian weight noise,
the surface along two random directions, the condition number of the neural tangent kernel, the share of active neurons,
and attention maps. A ``loss`` here is a function without arguments that gives the training loss of the current weights
as a scalar, in eval mode, without weight decay. λ_max falls with the loss itself: compare it at equal training loss, or
show both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[], Tensor]


class Eigenvalue(NamedTuple):
    """What ``hessian_top_eigenvalue`` found: the value, its unit eigenvector (shaped as the parameters), the effort."""

    value: float
    vector: list[Tensor]
    iterations: int
    converged: bool


def hessian_top_eigenvalue(
    loss: Loss | Sequence[Loss],
    params: Iterable[Tensor],
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Eigenvalue:
    """The eigenvalue of largest magnitude of the loss's Hessian with respect to ``params``, by power iteration.

    v <- Hv / ||Hv||, λ = vᵀHv, until λ changes by less than ``tolerance`` (relative) or ``iterations`` products are done.
    ``loss`` may be a sequence: its mean counts, taken one by one, for data too large for one graph. Parameters the loss
    does not depend on count as zero curvature. Attention is computed without fused kernels, which lack the second
    derivative.

    Raises ``ValueError`` for empty ``params`` or ``loss`` and for ``iterations`` below 1.

    >>> w = torch.ones(2, requires_grad=True)
    >>> found = hessian_top_eigenvalue(lambda: (torch.tensor([1.0, 5.0]) * w**2).sum() / 2, [w])
    >>> round(found.value, 2)
    5.0
    """
    params = [p for p in params if p.requires_grad]
    losses = [loss] if callable(loss) else list(loss)
    if not params or not losses:
        raise ValueError(
            f"params has {len(params)} trainable tensors and loss {len(losses)} terms, allowed is at least 1"
        )
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, allowed is iterations >= 1")
    # one graph of the gradient serves all products; several losses would hold several graphs, so those are made anew
    graph = _gradient_graph(losses[0], params) if len(losses) == 1 else None
    v = _unit([_noise(p, generator) for p in params])
    value, converged, done = float("nan"), False, 0
    for done in range(1, iterations + 1):  # noqa: B007
        if graph is not None:
            hv = _hessian_vector(graph, params, v)
        else:
            hv = [torch.zeros_like(p) for p in params]
            for term in losses:
                torch._foreach_add_(
                    hv, _hessian_vector(_gradient_graph(term, params), params, v), alpha=1 / len(losses)
                )
        before, value = value, sum((a * b).sum() for a, b in zip(v, hv, strict=True)).item()
        if abs(value - before) <= tolerance * abs(value):
            converged = True
            break
        v = _unit(hv)
    return Eigenvalue(value, v, done, converged)


def block_top_eigenvalues(
    loss: Loss | Sequence[Loss],
    blocks: Mapping[str, nn.Module | Iterable[Tensor]],
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """λ_max of the Hessian's diagonal blocks: with respect to one layer's parameters, the others held fixed (table 3).

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    >>> x = torch.rand(8, 3)
    >>> list(block_top_eigenvalues(lambda: net(x).square().mean(), {"first": net[0], "last": net[2]}))
    ['first', 'last']
    """
    found = {}
    for name, block in blocks.items():
        params = list(block.parameters() if isinstance(block, nn.Module) else block)
        found[name] = hessian_top_eigenvalue(
            loss, params, iterations=iterations, tolerance=tolerance, generator=generator
        ).value
    return found


def _gradient_graph(loss: Loss, params: Sequence[Tensor]) -> list[Tensor]:
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss()
        if value.ndim:
            raise ValueError(f"loss gives a tensor of shape {tuple(value.shape)}, allowed is a scalar")
        return list(torch.autograd.grad(value, params, create_graph=True, materialize_grads=True))


def _hessian_vector(gradients: Sequence[Tensor], params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    curved = [(g, a) for g, a in zip(gradients, v, strict=True) if g.requires_grad]
    if not curved:
        return [torch.zeros_like(p) for p in params]
    g, a = zip(*curved, strict=True)
    return list(torch.autograd.grad(g, params, a, retain_graph=True, materialize_grads=True))


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    # drawn on the CPU, so that every device sees the same numbers
    device = "cpu" if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like)


def _unit(v: Sequence[Tensor]) -> list[Tensor]:
    norm = torch.linalg.vector_norm(torch.stack([a.norm() for a in v])).clamp_min(1e-30)
    return [a / norm for a in v]


@contextmanager
def _displaced(params: Sequence[Tensor]):
    """Within the block the parameters may be moved; afterwards they are what they were, bit for bit."""
    before = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            yield before
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, before)


def filter_normalised_direction(params: Iterable[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """A Gaussian direction in which each filter has the length of the weights' filter (Li et al., arXiv 1712.09913).

    A filter is a row of a matrix, or the weights of one output channel. Biases and norms (vectors) do not move. This
    makes surfaces of networks comparable whose weights differ in scale without a difference in function.

    >>> direction = filter_normalised_direction([torch.full((2, 4), 0.5), torch.ones(2)])
    >>> direction[0].norm(dim=1).tolist(), direction[1].tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """
    direction = []
    for p in params:
        if p.ndim < 2:
            direction.append(torch.zeros_like(p))
            continue
        d, rows = _noise(p, generator).flatten(1), p.detach().flatten(1)
        d = d * (rows.norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True).clamp_min(1e-30))
        direction.append(d.view_as(p))
    return direction


@torch.no_grad()
def loss_surface(
    loss: Loss,
    params: Iterable[Tensor],
    *,
    steps: int = 21,
    radius: float = 1.0,
    directions: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "steps"], Float[Tensor, "steps steps"]]:
    """L(w + a·d₁ + b·d₂) on a square grid: the coordinates from -radius to radius, and the losses, ``[a, b]`` (figure 1).

    Without ``directions`` two filter-normalised ones are drawn. The weights are put back bit for bit.
    Raises ``ValueError`` for ``steps`` below 2 or a ``radius`` that is not positive.

    >>> w = torch.zeros(1, 1, requires_grad=True)
    >>> at, surface = loss_surface(lambda: w.sum() ** 2, [w], steps=3, directions=([torch.ones(1, 1)], [torch.zeros(1, 1)]))
    >>> surface[:, 0].tolist()
    [1.0, 0.0, 1.0]
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}, allowed is steps >= 2")
    if not radius > 0:
        raise ValueError(f"radius is {radius}, allowed is radius > 0")
    params = list(params)
    if directions is None:
        directions = tuple(filter_normalised_direction(params, generator) for _ in range(2))
    at = torch.linspace(-radius, radius, steps)
    surface = torch.empty(steps, steps)
    with _displaced(params) as before:
        for i, a in enumerate(at.tolist()):
            for j, b in enumerate(at.tolist()):
                for p, w, d1, d2 in zip(params, before, *directions, strict=True):
                    p.copy_(w + a * d1 + b * d2)
                surface[i, j] = loss()
    return at, surface


@torch.no_grad()
def noisy_loss(
    loss: Loss,
    params: Iterable[Tensor],
    *,
    sigma: float = 0.01,
    samples: int = 10,
    generator: torch.Generator | None = None,
) -> float:
    """The average loss under Gaussian weight noise, L_N = E L(w + N(0, σ²)): flatness on average (section 3.2).

    >>> w = torch.zeros(100, requires_grad=True)
    >>> 0.5 < noisy_loss(lambda: w.square().sum(), [w], sigma=0.1, generator=torch.Generator().manual_seed(0)) < 1.5
    True
    """
    if sigma < 0 or samples < 1:
        raise ValueError(f"sigma is {sigma} and samples is {samples}, allowed are sigma >= 0 and samples >= 1")
    params = list(params)
    with _displaced(params) as before:
        total = 0.0
        for _ in range(samples):
            for p, w in zip(params, before, strict=True):
                p.copy_(w + sigma * _noise(w, generator))
            total += float(loss())
    return total / samples


def ntk_condition_number(model: nn.Module, x: Float[Tensor, "n ..."]) -> float:
    """κ = λ_max / λ_min of the empirical neural tangent kernel Θ = J Jᵀ on the inputs ``x``: how trainable a start is.

    J holds, for each input, the gradient of the sum of its outputs by all trainable parameters. The model is taken in
    eval mode. Where Θ is singular to working precision κ is infinite.

    >>> kappa = ntk_condition_number(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 3))
    >>> kappa >= 1
    True
    """
    params = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            rows = []
            for sample in x:  # by one, so that no module has to be written for vmap
                by = torch.autograd.grad(model(sample[None]).sum(), params, materialize_grads=True)
                rows.append(torch.cat([g.flatten() for g in by]))
    finally:
        model.train(was_training)
    jacobian = torch.stack(rows).double()
    eigenvalues = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    least, most = eigenvalues[0].item(), eigenvalues[-1].item()
    return most / least if least > most * len(rows) * torch.finfo(torch.double).eps else float("inf")


@contextmanager
def _watched(model: nn.Module, hooks: list):
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)


def active_neuron_ratio(
    model: nn.Module, x: Float[Tensor, "n ..."], activations: Iterable[str] | None = None, batch_size: int = 256
) -> dict[str, float]:
    """Per layer, the share of an MLP's hidden units that are active: whose pre-activation is above 0 (section 4.3).

    ``activations`` names the activation modules to watch (default: every ``nn.GELU`` and ``nn.ReLU``); the average goes
    over units, tokens and inputs. Raises ``ValueError`` where a name is none of the model's or there is none to watch.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
    >>> list(active_neuron_ratio(net, torch.randn(5, 3)))
    ['1']
    """
    modules = dict(model.named_modules())
    if activations is None:
        activations = [name for name, module in modules.items() if isinstance(module, nn.GELU | nn.ReLU)]
    names = list(activations)
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise ValueError(f"activations is {names}, allowed are names of the model's modules, and at least one")
    active = dict.fromkeys(names, 0)
    seen = dict.fromkeys(names, 0)

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            active[name] += int((args[0] > 0).sum())
            seen[name] += args[0].numel()

        return modules[name].register_forward_pre_hook(hook)

    with _watched(model, [watch(name) for name in names]):
        for part in x.split(batch_size):
            model(part)
    return {name: active[name] / max(seen[name], 1) for name in names}


def attention_maps(model: nn.Module, x: Float[Tensor, "b c h w"], layer: int = -1) -> Float[Tensor, "b heads n n"]:
    """The attention weights softmax(QKᵀ/√d) of block ``layer`` (default: the last) of a ViT; row 0 is the class token's.

    Takes any model whose blocks have ``attn.qkv`` and ``attn.num_heads`` as timm's have.
    Raises ``ValueError`` where there is no such block.

    >>> from saigen.nn.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2)
    >>> attention_maps(vit, torch.rand(1, 3, 8, 8)).shape
    torch.Size([1, 2, 5, 5])
    """
    attentions = [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]
    if not -len(attentions) <= layer < len(attentions):
        raise ValueError(f"layer is {layer}, allowed are the {len(attentions)} attention layers of the model")
    attention, found = attentions[layer], []

    def hook(module: nn.Module, args: tuple[Tensor, ...], qkv: Tensor) -> None:
        q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1))

    with _watched(model, [attention.qkv.register_forward_hook(hook)]):
        model(x)
    return found[0]
