"""Weights that learn as a package stores them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.targets.coreml.compress import PALETTE4, Scheme, simulate
from pipeline.targets.coreml.trained import compressed, schemes_of

HALF = Scheme("pruned", sparsity=0.5)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "large": torch.randn(32, 8, 3, 3, generator=generator),
        "small": torch.randn(8, 4, generator=generator),
        "bias": torch.randn(3000, generator=generator),
    }
    return {name: value.requires_grad_() for name, value in made.items()}


@pytest.mark.parametrize("precision", ["coreml/int8", "coreml/palette4", "coreml/pruned75"])
def test_large_weights_become_what_is_stored(precision: str) -> None:
    own = weights()
    (scheme,) = schemes_of(precision)
    made = compressed(own, [scheme])
    expected = simulate(own["large"].detach().numpy().astype(np.float16), scheme)
    np.testing.assert_array_equal(made["large"].detach().numpy(), expected.astype(np.float32))
    assert not torch.equal(made["large"], own["large"])
    assert made["small"] is own["small"]
    assert made["bias"] is own["bias"]
    assert compressed(own, [scheme], threshold=31)["small"] is not own["small"]


def test_what_is_pruned_gets_no_gradient() -> None:
    own = weights()
    made = compressed(own, [HALF])["large"]
    made.sum().backward()
    gradient = own["large"].grad
    assert gradient is not None
    assert (made == 0).float().mean() == pytest.approx(0.5, abs=0.001)
    assert torch.equal(gradient == 0, made == 0)


def test_a_table_learns_with_all_of_its_values() -> None:
    own = weights()
    made = compressed(own, [PALETTE4])["large"]
    made.sum().backward()
    assert len(made.unique()) == 16
    assert own["large"].grad is not None
    assert (own["large"].grad == 1).all()


@pytest.mark.parametrize("precision", ["w8a8", "auto", "fp16", "pruned50_int8", "int3"])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"no network is fine-tuned in .*{precision}"):
        schemes_of(f"coreml/{precision}")
