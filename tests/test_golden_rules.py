"""The golden runner itself: it must see errors, and know a kink from one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmix.mixers import QMixer
from fastmix.testing import golden as reference
from fastmix.testing.golden import Golden
from tests.golden_rules import RULES, Setting, find_rule, make_learner

SIZES = {"A": 3, "U": 5, "S": 11, "mixing_embed_dim": 16, "hypernet_layers": 1}
FLOAT64 = Setting("reference", torch.float64, "cpu")
FLOAT32 = Setting("reference", torch.float32, "cpu")


def qmix_file(folder: Path, *, kinks: int = 0) -> Golden:
    """A `qmix` file of float32-exact numbers; `kinks` generated weights are zero up to float32 rounding."""
    mixer = QMixer(3, 11, 16, hypernet_layers=1).double()
    agent_qs, states, cotangent = (torch.randn(4, 6, n).float().double() for n in (3, 11, 1))
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(p.float())
        for i in range(kinks):
            raw = mixer.hyper_w_1(states[i % 4, i // 4])
            mixer.hyper_w_1.bias[i] = (mixer.hyper_w_1.bias[i] - raw[i]).float()  # type: ignore[index,operator]
    agent_qs.requires_grad_()
    q_tot = mixer(agent_qs, states)
    (q_tot * cotangent).sum().backward()
    assert agent_qs.grad is not None
    arrays: dict[str, Tensor] = {
        "in/agent_qs": agent_qs,
        "in/states": states,
        "out/q_tot": q_tot,
        "cotangent/q_tot": cotangent,
        "gradin/agent_qs": agent_qs.grad,
        **{f"param/{name}": p for name, p in mixer.named_parameters()},
        **{f"grad/{name}": p.grad for name, p in mixer.named_parameters() if p.grad is not None},
    }
    meta = {"meta/kind": np.array("qmix"), "meta/hp_json": np.array(json.dumps(SIZES))}
    stored = {name: tensor.detach().numpy() for name, tensor in arrays.items()}
    np.savez(folder / "made.npz", allow_pickle=False, **stored, **meta)
    return reference.load(folder / "made.npz")


@pytest.mark.parametrize("setting", [FLOAT64, FLOAT32], ids=str)
@pytest.mark.parametrize("section", ["outputs", "grads", "input_grads"])
def test_a_wrong_entry_is_seen(setting: Setting, section: str, tmp_path: Path) -> None:
    golden = qmix_file(tmp_path)
    RULES["qmix"].run(golden, setting)
    arrays = getattr(golden, section)
    name = min(arrays)
    arrays[name] *= 1 + 1e-3 * torch.rand(arrays[name].shape)
    with pytest.raises(AssertionError, match=name):
        RULES["qmix"].run(golden, setting)


def test_a_missing_gradient_is_seen(tmp_path: Path) -> None:
    golden = qmix_file(tmp_path)
    none_grads = replace(golden, none_grads=frozenset({"V.0.weight"}))
    with pytest.raises(AssertionError):
        RULES["qmix"].run(none_grads, FLOAT64)
    with pytest.raises(AssertionError):
        RULES["qmix"].run(replace(golden, grads={}), FLOAT64)


def test_a_kink_is_no_error_in_float32(tmp_path: Path) -> None:
    golden = qmix_file(tmp_path, kinks=12)
    rule = RULES["qmix"]
    rule.run(golden, FLOAT64)
    rule.run(golden, FLOAT32)
    assert rule.kinks(golden)["grad/hyper_w_1.weight"] > 1e-3
    assert max(rule.kinks(qmix_file(tmp_path)).values()) < 1e-5
    wrong = {**golden.grads, "V.0.weight": golden.grads["V.0.weight"] * 1.0001}  # has no part in the kinks
    with pytest.raises(AssertionError, match=r"V\.0\.weight"):
        rule.run(replace(golden, grads=wrong), FLOAT32)


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    golden = qmix_file(tmp_path)
    assert find_rule(golden) is RULES["qmix"]
    with pytest.raises(LookupError, match="no rule handles 'qmix_of_tomorrow'"):
        find_rule(replace(golden, kind="qmix_of_tomorrow"))
    learner = replace(golden, kind="learner", config={"learner": "q_learner", "mixer": "other"})
    with pytest.raises(LookupError, match="learner/q_learner/other"):
        find_rule(learner)


def test_unknown_hyper_parameters_are_refused(tmp_path: Path) -> None:
    config = {"A": 2, "U": 2, "S": 2, "O": 2, "T": 3, "learner": "q_learner", "mixer": "vdn", "repo": "wqmix", "x": 1}
    learner = replace(qmix_file(tmp_path), kind="learner", config=config)
    with pytest.raises(LookupError, match="'x'"):
        make_learner(learner, FLOAT64)
