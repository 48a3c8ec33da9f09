"""Checkpoints are untrusted, and every tensor that does not fit is named."""

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from saigen import weights


class Net(nn.Module):
    classifier_name = "head"

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, num_classes)

    @staticmethod
    def convert_state_dict(state):
        return {name.removeprefix("module."): value for name, value in state.items()}


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def build(*, num_classes=10):
    return Net(num_classes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_kinds_of_files(tmp_path, suffix):
    net, path = Net(), tmp_path / f"w{suffix}"
    state = net.state_dict()
    if suffix == ".safetensors":
        weights.save(net, path)
    elif suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        np.savez(path, **{k: v.numpy() for k, v in state.items()})
    other = Net()
    if suffix == ".pt":
        with pytest.warns(UserWarning, match="weights_only=True"):
            weights.load(other, path)
    else:
        weights.load(other, path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_folder_with_shards(tmp_path):
    net = Net()
    state = net.state_dict()
    names = list(state)
    save_file({n: state[n] for n in names[:3]}, tmp_path / "a.safetensors")
    save_file({n: state[n] for n in names[3:]}, tmp_path / "b.safetensors")
    index = {n: "a.safetensors" if i < 3 else "b.safetensors" for i, n in enumerate(names)}
    import json

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert set(weights.read(tmp_path)) == set(names)
    index[names[0]] = "../outside.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match="not a file of that folder"):
        weights.read(tmp_path)
    for broken in (
        '{"weight_map": {"a": 3}}',
        '{"weight_map": [1]}',
        '{"weight_map": {"a": [1], "b": "c"}}',
        "{",
        "[]",
    ):
        (tmp_path / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(ValueError, match="is not an index of safetensors files"):
            weights.read(tmp_path)


def test_a_checkpoint_that_holds_itself(tmp_path):
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pt")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="holds no tensors by name"):
        weights.read(tmp_path / "w.pt")


def test_a_hostile_pickle_runs_nothing(tmp_path):
    for name, dump in (("a.pt", torch.save), ("b.bin", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        dump({"state_dict": Hostile(tmp_path / "pwned")}, tmp_path / name)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="cannot be read safely"):
            weights.read(tmp_path / name)
    arrays = np.empty(1, dtype=object)
    arrays[0] = Hostile(tmp_path / "pwned")
    np.savez(tmp_path / "c.npz", a=arrays)
    with pytest.raises(ValueError, match="plain arrays"):
        weights.read(tmp_path / "c.npz")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_truncated_file_is_one_sentence(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        weights.save(Net(), path)
    else:
        np.savez(path, a=np.zeros(1000))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a whole"):
        weights.read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("body.bias"), "body.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is unexpected"),
        (lambda s: s["body.weight"][2].fill_(float("nan")), "body.weight holds values that are not finite"),
        (lambda s: s.update({"body.weight": torch.zeros(6, 5)}), r"body.weight has shape \(6, 5\), expected \(6, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    state = {name: value.clone() for name, value in Net().state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=said):
        weights.load(Net(), state)


def test_the_checkpoint_decides_the_classes_and_another_count_leaves_the_head_new(tmp_path):
    weights.save(Net(7), tmp_path / "w.safetensors")
    assert weights.create(build, tmp_path / "w.safetensors", num_classes=None).head.out_features == 7
    with pytest.warns(UserWarning, match=r"head.weight, head.bias stay new"):
        model = weights.create(build, tmp_path / "w.safetensors", num_classes=3)
    assert model.head.out_features == 3


@pytest.mark.parametrize("source", ["nowhere.safetensors", "no such thing", "model.txt"])
def test_no_such_weights(source):
    with pytest.raises(ValueError, match="no such file or folder"):
        weights.read(source)


def test_a_batch_counter_may_be_missing():
    state = {n: v for n, v in Net().state_dict().items() if "num_batches_tracked" not in n}
    weights.load(Net(), state)


def test_the_arguments_of_a_model_are_those_of_its_class_where_its_function_hands_them_on():
    class Wider(Net):
        def __init__(self, width=1, **rest):
            super().__init__(**rest)

    def plain(*, num_classes=10, drop_rate=0.0) -> Net: ...

    def handing_on(*, depth=3, **overrides) -> Net: ...

    def handing_further_on(*, depth=3, **overrides) -> Wider: ...

    assert weights.arguments(plain) == ["num_classes", "drop_rate"]
    assert weights.arguments(handing_on) == ["depth", "num_classes"]
    assert weights.arguments(handing_further_on) == ["depth", "width", "num_classes"]
