"""The pieces of the affinity loss beside torch's own hinge and distances."""

import torch
from torch.nn import functional as F

from saigen.papers.losses.affinity import affinity_loss, gaussian_affinity


def test_equals_torch_distances_and_hinge():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 16, dtype=torch.float64, generator=generator)
    centers = torch.randn(6, 4, 16, dtype=torch.float64, generator=generator)
    target = torch.randint(6, (30,), generator=generator)
    ours = [t.clone().requires_grad_() for t in (features, centers)]
    theirs = [t.clone().requires_grad_() for t in (features, centers)]
    found = affinity_loss(gaussian_affinity(*ours, 20.0), target, ours[1], margin=0.75)

    every = theirs[1].flatten(0, 1)
    square = torch.cdist(theirs[0], every, compute_mode="donot_use_mm_for_euclid_dist").square().unflatten(1, (6, 4))
    affinity = torch.exp(-square / 20.0).amax(-1)
    true = affinity.gather(1, target[:, None])
    hinge = F.margin_ranking_loss(
        true.expand_as(affinity), affinity, torch.ones_like(affinity), margin=0.75, reduction="none"
    )
    hinge = hinge.masked_fill(F.one_hot(target, 6).bool(), 0.0).sum(1).mean()
    expected = hinge + torch.pdist(every).square().var(correction=0)

    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)
