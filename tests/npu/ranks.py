"""What each rank of a group does, for test_distributed.py: `python ranks.py RANK SIZE FOLDER CHECK...`.

Every rank writes FOLDER/RANK.json: check -> "" or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import moe_kernels
import torch
import torch.distributed as dist
import training
from cases import chosen_experts, distance, random
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from model import build
from model.data import batch
from model.losses import losses_of
from model.optim import adamw

Check = Callable[[int, int, Path], None]


def equal(found: Tensor, expected: list[float]) -> None:
    assert found.float().cpu().flatten().tolist() == expected, (found, expected)


def full(value: float, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((count,), value, dtype=dtype, device="npu")


def all_reduce(rank: int, size: int, _: Path) -> None:
    for op, expected in [("SUM", size * (size + 1) / 2), ("MAX", size), ("MIN", 1), ("AVG", (size + 1) / 2)]:
        for dtype in (torch.float32, torch.bfloat16):
            x = full(rank + 1, 5, dtype)
            dist.all_reduce(x, getattr(dist.ReduceOp, op))
            equal(x, [expected] * 5)


def all_gather(rank: int, size: int, _: Path) -> None:
    out = full(-1, 3 * size)
    dist.all_gather_into_tensor(out, full(rank, 3))
    equal(out, [float(r) for r in range(size) for _ in range(3)])


def reduce_scatter(rank: int, size: int, _: Path) -> None:
    out = full(-1, 2)
    dist.reduce_scatter_tensor(out, torch.arange(2.0 * size, device="npu"))
    equal(out, [size * 2.0 * rank, size * (2.0 * rank + 1)])


def broadcast(rank: int, size: int, _: Path) -> None:
    x = full(rank, 4)
    dist.broadcast(x, src=size - 1)
    equal(x, [size - 1.0] * 4)


def reduce_and_scatter(rank: int, size: int, _: Path) -> None:
    x, out = full(rank + 1, 3), full(-1, 2)
    dist.reduce(x, dst=size - 1)
    if rank == size - 1:
        equal(x, [size * (size + 1) / 2] * 3)
    dist.scatter(out, [full(other, 2) for other in range(size)] if rank == 0 else None, src=0)
    equal(out, [float(rank)] * 2)


def send_and_receive(rank: int, size: int, _: Path) -> None:
    """Around a ring, more than fits one mailbox."""
    x, out = full(rank, (32 << 18) + 7), full(-1, (32 << 18) + 7)
    requests = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, x, (rank + 1) % size), dist.P2POp(dist.irecv, out, (rank - 1) % size)]
    )
    for request in requests:
        request.wait()
    assert bool((out == (rank - 1) % size).all())


def uneven_all_to_all(rank: int, size: int, _: Path) -> None:
    """Rank r sends (r + s) % 3 elements to rank s, so some send nothing."""
    sends, receives = ([(rank + other) % 3 for other in range(size)] for _ in range(2))
    out = full(-1, sum(receives))
    dist.all_to_all_single(out, full(rank, sum(sends)), receives, sends)
    equal(out, [float(other) for other in range(size) for _ in range(receives[other])])


def subgroup(rank: int, size: int, _: Path) -> None:
    halves = [dist.new_group(list(range(start, start + size // 2))) for start in (0, size // 2)]
    x = full(rank, 2)
    dist.all_reduce(x, group=halves[rank >= size // 2])
    members = range(size // 2) if rank < size // 2 else range(size // 2, size)
    equal(x, [float(sum(members))] * 2)


def expert_parallel(rank: int, size: int, _: Path) -> None:
    """Each rank holds a share of the experts; tokens go to them and come back: the same as all experts in one place."""
    experts, top_k, tokens = 4 * size, 2, 11 + rank
    gate_up, down = random(experts, 16, 12) * 0.3, random(experts, 12, 8) * 0.3
    x, indices = random(tokens, 12, seed=rank), chosen_experts(tokens, top_k, used=experts, seed=rank)
    weights = random(tokens, top_k, seed=rank).abs()
    x_ND, places, counts = moe_kernels.permute(x.npu(), indices.npu(), experts)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts)
    sends, receives = (c.view(size, -1).sum(1).tolist() for c in (counts, theirs))
    arrived = x_ND.new_empty(sum(receives), x_ND.shape[1])
    dist.all_to_all_single(arrived, x_ND, receives, sends)
    owner = torch.arange(experts // size).repeat(size).repeat_interleave(theirs.cpu()).npu()
    mine = slice(rank * experts // size, (rank + 1) * experts // size)
    ones = torch.ones(len(owner), 1, device="npu")
    y = moe_kernels.experts(arrived, owner.unsqueeze(1), ones, gate_up[mine].npu(), down[mine].npu())
    back = torch.empty_like(x_ND)
    dist.all_to_all_single(back, y, sends, receives)
    ours = moe_kernels.unpermute(back, places, weights.npu())
    assert distance(ours, moe_kernels.experts(x, indices, weights, gate_up, down)) < 2e-5


def sharded_net(size: int) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = build(training.V3, seed=0).npu()
    mesh = init_device_mesh("npu", (size,))
    for block in net.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def steps(net: torch.nn.Module, rank: int, size: int, count: int, on: str = "npu") -> list[float]:
    """Mean loss over the ranks of each step; every rank trains on its rows of the batch of one process."""
    optimizer, losses, share = adamw(net, 1e-2, 0.1), [], 4 // size
    for step in range(count):
        rows = batch(training.Documents(), step * 4 + rank * share, share)
        tensors = (tensor.to(on) for tensor in (rows.input_ids, rows.targets, rows.document_ids))
        loss = losses_of(net, *tensors, sparse=True)[0]["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean, dist.ReduceOp.AVG)
        losses.append(mean.item())
    return losses


def fully_sharded_training(rank: int, size: int, folder: Path) -> None:
    """The curve of one process on the CPU, written beforehand by the test."""
    expected = json.loads((folder / "expected.json").read_text())
    found = steps(sharded_net(size), rank, size, len(expected))
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4, (found, expected)


def checkpoint(rank: int, size: int, folder: Path) -> None:
    """Save a trained net, load it into a fresh one: the same loss on the next batch, another before."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    trained, fresh = sharded_net(size), sharded_net(size)
    steps(trained, rank, size, 2)
    save({"net": get_model_state_dict(trained)}, checkpoint_id=folder / "saved")
    state = {"net": get_model_state_dict(fresh)}
    before = steps(sharded_net(size), rank, size, 1)
    load(state, checkpoint_id=folder / "saved")
    set_model_state_dict(fresh, state["net"])
    after = steps(fresh, rank, size, 1)
    assert after == steps(trained, rank, size, 1) and after != before


def mesh_of_tensors(rank: int, size: int, _: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("npu", (size,))
    a, b = random(2 * size, 6), random(6, 3)
    ours = distribute_tensor(a.npu(), mesh, [Shard(0)]) @ distribute_tensor(b.npu(), mesh, [Replicate()])
    assert distance(ours.full_tensor(), a @ b) < 2e-5


def reduce_twenty_times(rank: int, size: int, _: Path) -> None:
    for _ in range(20):
        dist.all_reduce(full(rank, 4))
        torch.accelerator.synchronize()


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        all_reduce, all_gather, reduce_scatter, broadcast, reduce_and_scatter, send_and_receive, uneven_all_to_all,
        subgroup, expert_parallel, mesh_of_tensors, fully_sharded_training, checkpoint, reduce_twenty_times,
    )
}  # fmt: skip


def main(rank: int, size: int, folder: Path, names: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.npu.set_device(rank)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("cpu:gloo,npu:hccl", store=store, rank=rank, world_size=size)
    found = {}
    for name in names:
        try:
            CHECKS[name](rank, size, folder)
            found[name] = ""
        except AssertionError as error:
            found[name] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
