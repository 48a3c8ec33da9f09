"""Writes ``golden.npz``: what the official code answers at weights and inputs of ``filling.py``.

    python tests/golden/decision_transformer/make.py PATH_OF_A_CHECKOUT_OF_kzl/decision-transformer

Made with commit e2d82e68. Its GPT-2 was written for transformers 4.5; the few names it imports that are gone since then
are put back here, none of which takes part in the forward pass but ``Conv1D``.
"""

import json
import logging
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.golden.decision_transformer.filling import atari_inputs, filled, gym_inputs  # noqa: E402


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(filled(name, tuple(parameter.shape)))


def answers(
    model: nn.Module, outputs: dict[str, torch.Tensor], prefix: str, kept: torch.Tensor | slice = slice(None)
) -> dict[str, np.ndarray]:
    """Outputs, the weights' names and shapes, and the gradient norm of each from the squared actions of kept steps."""
    outputs["actions"][kept].square().sum().backward()
    result = {f"{prefix}/output/{name}": value.detach().numpy() for name, value in outputs.items()}
    weights = {
        name: [[*parameter.shape], 0.0 if parameter.grad is None else parameter.grad.double().norm().item()]
        for name, parameter in model.named_parameters()
    }
    result[f"{prefix}/weights"] = np.array(json.dumps(weights))
    return result


def old_transformers() -> None:
    import transformers
    from transformers.pytorch_utils import Conv1D
    from transformers.utils import ModelOutput

    def plain(*_: object, **__: object):
        return lambda function: function

    class PreTrainedModel(nn.Module):
        def __init__(self, config, *_: object, **__: object) -> None:
            super().__init__()
            self.config = config

        dtype = torch.float32

        def init_weights(self) -> None: ...

        def get_head_mask(self, mask, layers):
            return [None] * layers

    def module(name: str, **names: object) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        sys.modules[name] = made

    module(
        "transformers.file_utils",
        ModelOutput=ModelOutput,
        add_code_sample_docstrings=plain,
        add_start_docstrings=plain,
        add_start_docstrings_to_model_forward=plain,
        replace_return_docstrings=plain,
    )
    module(
        "transformers.modeling_utils",
        Conv1D=Conv1D,
        PreTrainedModel=PreTrainedModel,
        SequenceSummary=None,
        find_pruneable_heads_and_indices=None,
        prune_conv1d_layer=None,
    )
    module("transformers.utils.model_parallel_utils", assert_device_map=None, get_device_map=None)
    assert transformers.GPT2Config


def gym(checkout: Path) -> dict[str, np.ndarray]:
    from saigen.testing.peers import import_peer

    import_peer("transformers")
    old_transformers()
    sys.path.insert(0, str(checkout / "gym"))
    package = types.ModuleType("decision_transformer.models")
    package.__path__ = [str(checkout / "gym/decision_transformer/models")]
    sys.modules["decision_transformer.models"] = package
    from decision_transformer.models.decision_transformer import DecisionTransformer

    model = DecisionTransformer(
        state_dim=5,
        act_dim=3,
        hidden_size=16,
        max_length=4,
        max_ep_len=9,
        n_layer=2,
        n_head=2,
        n_inner=64,
        activation_function="relu",
        n_positions=1024,
        n_ctx=1024,
    ).eval()
    fill(model)
    states, actions, returns = model(rewards=None, **gym_inputs())
    kept = gym_inputs()["attention_mask"].bool()
    return answers(model, {"states": states, "actions": actions, "returns": returns}, "gym", kept)


def atari(checkout: Path) -> dict[str, np.ndarray]:
    sys.path.insert(0, str(checkout / "atari"))
    from mingpt.model_atari import GPT, GPTConfig

    result: dict[str, np.ndarray] = {}
    for kind in ("reward_conditioned", "naive"):
        config = GPTConfig(4, 9, n_layer=2, n_head=2, n_embd=16, model_type=kind, max_timestep=9)
        model = GPT(config).eval()
        fill(model)
        given = atari_inputs()
        logits, _ = model(
            given["states"].flatten(2),
            given["actions"].unsqueeze(-1),
            given["actions"].unsqueeze(-1),
            given["returns_to_go"],
            given["timesteps"].view(2, 1, 1),
        )
        result |= answers(model, {"actions": logits}, kind)
    return result


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    checkout = Path(sys.argv[1])
    np.savez_compressed(Path(__file__).parent / "golden.npz", **gym(checkout), **atari(checkout))
