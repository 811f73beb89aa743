from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from care.distributed import World, choose_device, synchronize_batch_norm, world
from pipeline.core.errors import ConfigError


def test_without_a_launcher_a_process_is_alone() -> None:
    with world("cpu") as alone:
        assert (alone.rank, alone.size, alone.is_main) == (0, 1, True)
        values = torch.tensor([1.0, 2.0])
        assert torch.equal(alone.mean(values), values)
        alone.wait()


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="device 'cuda:77' cannot be used here"):
        choose_device("cuda:77")
    with pytest.raises(ConfigError, match="'gpu'"):
        choose_device("gpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))


def learn(model: nn.Module, images: Tensor, scale: float) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics after one batch."""
    output = model(images)
    (output.tanh().square().sum() * scale).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads, **dict(model.named_buffers())}


def images() -> Tensor:
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1


def share(rank: int, folder: str) -> None:
    """One of two processes: four of the images to the first, two to the second."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = synchronize_batch_norm(network(), torch.device("cpu"))
    found = learn(model, images().split([4, 2])[rank], 1.0)
    both = World(rank, 2, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = both.sum(parameter.grad)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_synchronized_batch_norm_equals_one_process(tmp_path: Path) -> None:
    spawn(share, (str(tmp_path),), nprocs=2)
    expected = learn(network(), images(), 1.0)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    output = torch.cat([half.pop("output") for half in halves])
    torch.testing.assert_close(output, expected.pop("output"), rtol=1e-5, atol=1e-5)
    assert halves[0].keys() == expected.keys()
    for half in halves:
        for name, value in expected.items():
            torch.testing.assert_close(half[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_synchronizing_keeps_the_names_of_the_weights() -> None:
    before = network().state_dict()
    after = synchronize_batch_norm(network(), torch.device("cpu")).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
