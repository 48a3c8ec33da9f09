"""Golden vectors of the official MoCo code (facebookresearch/moco): python make.py CHECKOUT.

``moco/builder.py`` is run as it is, in two processes as on two devices (gloo instead of NCCL, and ``cuda()`` leaves
tensors where they are), wrapped and trained as ``main_moco.py`` does. Weights and images come from a fixed stream, that
the test draws again; recorded are the shuffles, logits, queues and what the weights became.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

PROCESSES, BATCH, STEPS = 2, 4, 4  # the batch of a process
OPTIONS = {"dim": 6, "K": 16, "m": 0.9, "T": 0.2}
RATE = 0.5


class Encoder(nn.Module):
    """A network as torchvision's are: built for ``num_classes``, its last layer called ``fc``."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, 2, 1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 7, 3, 2, 1, bias=False), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def fill(model, seed=0):
    """Query encoder and queue from a fixed stream, in the order of the names; f_k starts as f_q."""
    rng, state = np.random.RandomState(seed), model.state_dict()
    for name in sorted(state):
        if name.startswith("encoder_q.") and "running" not in name and "num_batches" not in name:
            value = 0.5 * rng.standard_normal(tuple(state[name].shape))
            state[name].copy_(torch.from_numpy(value + (1 if ".bn" in name and name.endswith("weight") else 0)))
            state[name.replace("encoder_q.", "encoder_k.")].copy_(state[name])
    queue = torch.from_numpy(rng.standard_normal((OPTIONS["dim"], OPTIONS["K"]))).float()
    return nn.functional.normalize(queue, dim=0)


def images(seed=1):
    """(steps, 2 views, processes, batch, 3, 8, 8)."""
    shape = (STEPS, 2, PROCESSES, BATCH, 3, 8, 8)
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def train(rank, checkout, mlp, port, results):
    sys.path.insert(0, checkout)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    torch.manual_seed(rank)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    from moco.builder import MoCo

    model = MoCo(Encoder, mlp=mlp, **OPTIONS)
    model.queue.copy_(fill(model))
    shuffles, official = [], MoCo._batch_shuffle_ddp

    def remember(self, x):
        x, restore = official(self, x)
        shuffles.append(restore.argsort().numpy())
        return x, restore

    MoCo._batch_shuffle_ddp = remember
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    found = {"logits": [], "queue": [], "ptr": []}
    for x_q, x_k in images()[:, :, rank]:
        output, target = wrapped(im_q=x_q, im_k=x_k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, target).backward()
        optimizer.step()
        for name, value in (("logits", output), ("queue", model.queue), ("ptr", model.queue_ptr)):
            found[name].append(value.detach().clone().numpy())
    found = {name: np.stack(values) for name, values in found.items()}
    kept = {name: value.numpy() for name, value in model.state_dict().items() if name.startswith("encoder_")}
    results.put((rank, found | {"shuffles": np.stack(shuffles)} | kept))
    dist.destroy_process_group()


def detector_names(checkout):
    """What ``convert-pretrain-to-detectron2.py`` makes of the names of a few weights."""
    import pickle
    import tempfile

    names = ["conv1.weight", "bn1.running_var", "layer1.0.conv2.weight", "layer1.0.bn2.weight", "layer4.2.bn3.bias"]
    names += ["layer2.0.downsample.0.weight", "layer3.0.downsample.1.running_mean"]
    with tempfile.TemporaryDirectory() as folder:
        state = {f"module.encoder_q.{name}": torch.tensor([float(n)]) for n, name in enumerate(names)}
        torch.save({"state_dict": state}, f"{folder}/in.pth")
        script = Path(checkout) / "detection" / "convert-pretrain-to-detectron2.py"
        subprocess.run([sys.executable, script, f"{folder}/in.pth", f"{folder}/out.pkl"], check=True)
        model = pickle.loads(Path(f"{folder}/out.pkl").read_bytes())["model"]
    back = {int(value[0]): name for name, value in model.items()}
    return "\n".join(f"{name} {back[n]}" for n, name in enumerate(names))


def main(checkout):
    golden = {"detectron2": np.array(detector_names(checkout))}
    for number, version in enumerate(("v1", "v2")):
        context = mp.get_context("spawn")
        results = context.SimpleQueue()
        spawned = mp.spawn(train, (checkout, version == "v2", 29_611 + number, results), PROCESSES, join=False)
        found = dict(results.get() for _ in range(PROCESSES))
        spawned.join()
        for name, value in found[0].items():
            # logits and batch statistics are each device's own, all else is the same on both
            own = name == "logits" or "running" in name
            if not own:
                np.testing.assert_array_equal(value, found[1][name])
            golden[f"{version}_{name}"] = np.stack([value, found[1][name]]) if own else value
    np.savez_compressed(Path(__file__).with_name("official.npz"), **golden)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
