from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore

from care.distributed import World, choose_device, synchronize_batch_norm, world
from pipeline.core.errors import ConfigError, DataError, UnavailableError
from tests.care.processes import run_apart


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
    assert run_apart(share, [(rank, str(tmp_path)) for rank in range(2)]) == [0, 0]
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


def tell(rank: int, folder: str) -> None:
    """One of three processes: what they tell each other."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    world = World(rank, 3, torch.device("cpu"), rank, dist.group.WORLD)
    found: list[object] = [world.from_main(lambda: {"rank": rank}), world.gather(rank)]

    def fail() -> None:
        raise DataError("no images")

    try:
        world.from_main(fail)
    except (DataError, SystemExit) as error:
        found.append((type(error).__name__, str(error)))
    try:
        world.require_same({"lr": 0.1, "images": 5 if rank < 2 else 4})
    except ConfigError as error:
        found.append(str(error))
    norm = nn.BatchNorm1d(1)
    assert norm.running_mean is not None
    norm.running_mean.fill_(float(rank))
    world.average_statistics(norm)
    found.append(norm.running_mean.item())
    with world.one_on_each_machine_first():
        known = sorted(path.name for path in Path(folder).glob("fetched-*"))
        found.append(known == [] if rank == 0 else "fetched-0" in known)
        Path(folder, f"fetched-{rank}").touch()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_what_the_main_process_finds_or_misses_is_known_to_all(tmp_path: Path) -> None:
    assert run_apart(tell, [(rank, str(tmp_path)) for rank in range(3)]) == [0, 0, 0]
    for rank in range(3):
        same, ranks, failed, differs, mean, first = torch.load(tmp_path / f"{rank}.pt")
        assert same == {"rank": 0}
        assert ranks == [0, 1, 2]
        assert failed == (("DataError", "no images") if rank == 0 else ("SystemExit", "2"))
        assert differs.startswith("process 2 on ")
        assert "another images than process 0: 4, not 5" in differs
        assert mean == 1.0
        assert first


def launched(rank: int, port: int, **more: str) -> dict[str, str]:
    """What torchrun says to one of two processes."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        **more,
    }


def meet_twice(folder: Path, environment: dict[str, str]) -> None:
    """One of two processes that are restarted once; each time, the other one comes first."""
    os.environ.update(environment)
    found = []
    for attempt in range(2):
        if attempt == int(environment["RANK"]):
            time.sleep(1)  # the others find what was there before
        with world("cpu", timeout_minutes=2) as both:
            found.append(both.sum(torch.ones(1)).item())
    (folder / environment["RANK"]).write_text(str(found))


def test_what_processes_before_them_left_does_not_mislead_new_ones(tmp_path: Path) -> None:
    """torchrun keeps its store over restarts: half of them hung in gloo."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for rank in ("0", "1"):
        for key in ("hello", "answer", "thanks"):
            server.set(f"{key}/{rank}", "f00 f00")
    calls = [
        (tmp_path, launched(rank, server.port, TORCHELASTIC_USE_AGENT_STORE="True"))
        for rank in range(2)
    ]
    assert run_apart(meet_twice, calls) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[2.0, 2.0]"] * 2


def lose(folder: Path, environment: dict[str, str], minutes: float) -> None:
    """One of two processes, of which the second one goes away at once."""
    os.environ.update(environment)
    try:
        with world("cpu", timeout_minutes=minutes) as both:
            if both.rank == 1:
                os._exit(1)
            both.sum(torch.zeros(1))
    except UnavailableError as error:
        (folder / "said").write_text(str(error))


@pytest.mark.parametrize("others", [0, 1], ids=["never came", "went away"])
def test_a_lost_process_is_one_line(tmp_path: Path, others: int) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    minutes = 5 if others else 0.02
    calls = [(tmp_path, launched(rank, port), minutes) for rank in range(1 + others)]
    assert run_apart(lose, calls) == [0, 1][: 1 + others]
    said = (tmp_path / "said").read_text()
    assert said.startswith("process 0 of 2 on "), said
    assert "--resume" in said
    assert "\n" not in said
