"""The modules hold parameters under PyTorch's names and keep working when FSDP2 shards them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from umt_kernels import (
    AddLayerNorm,
    GatherLayerNorm,
    GatherRMSNorm,
    PatchEmbed,
    add_layer_norm,
    cosine_alignment_loss,
    gather_layer_norm,
    gather_rms_norm,
    patch_embed,
)

IDS = torch.tensor([[0, 3, 2], [1, 2, 0]])


def test_modules_are_the_functions_with_pytorchs_state(device):
    x = torch.randn(2, 4, 6, device=device)
    norm = GatherLayerNorm(6, eps=1e-3).to(device)
    plain = nn.LayerNorm(6)
    nn.init.normal_(plain.weight)
    norm.load_state_dict(plain.state_dict())
    ids = IDS.to(device)
    assert torch.equal(norm(x, row_ids=ids), gather_layer_norm(x, norm.weight, norm.bias, 1e-3, row_ids=ids))
    rms = GatherRMSNorm(6).to(device)
    expected = gather_rms_norm(x, rms.weight, torch.finfo(torch.float32).eps, row_ids=ids)
    assert torch.equal(rms(x, row_ids=ids), expected)
    assert (rms(x) - nn.functional.rms_norm(x, (6,), rms.weight)).abs().max() < 1e-5
    conv = nn.Conv2d(3, 5, (4, 2), stride=(4, 2)).to(device)
    image = torch.randn(2, 3, 8, 4, device=device)
    assert torch.equal(
        PatchEmbed(conv)(image, token_ids=ids), patch_embed(image, conv.weight, conv.bias, (4, 2), token_ids=ids)
    )
    assert (PatchEmbed(conv)(image) - conv(image).flatten(2).mT).abs().max() < 1e-5
    added = AddLayerNorm(6, eps=1e-3).to(device)
    expected = add_layer_norm(x, x.flip(1), added.weight, added.bias, 1e-3, out_dtype=torch.bfloat16)
    for ours, theirs in zip(added(x, x.flip(1), out_dtype=torch.bfloat16), expected, strict=True):
        assert torch.equal(ours, theirs)
    bare = GatherLayerNorm(6, elementwise_affine=False)
    assert torch.equal(bare(x), gather_layer_norm(x, None, None, bare.eps))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = PatchEmbed(nn.Conv3d(3, 8, (1, 4, 4), stride=(1, 4, 4)))
        self.norm = GatherLayerNorm(8)
        self.rms = GatherRMSNorm(8)
        self.added = AddLayerNorm(8)

    def forward(self, clip: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(clip)
        rows = self.norm(x, row_ids=IDS[:1].expand(len(x), -1).contiguous())
        _, rows = self.added(rows, rows.flip(1), scale=0.5)
        return cosine_alignment_loss(self.rms(rows, out_dtype=torch.float32), targets)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    clip = torch.randint(0, 256, (4, 2, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return clip, torch.randn(4, 3, 8, generator=generator)


def one_of_two(rank: int, folder: str) -> None:
    """A process of the test below: half the batch, a shard of every parameter."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    net, mesh = Net(), init_device_mesh("cpu", (2,))
    for module in (net.embed, net.norm, net.rms, net.added, net):
        fully_shard(module, mesh=mesh)
    clip, targets = inputs()
    net(clip[2 * rank : 2 * rank + 2], targets[2 * rank : 2 * rank + 2]).backward()
    grads = {name: parameter.grad.full_tensor() for name, parameter in net.named_parameters()}
    torch.save(grads, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_fsdp2_gives_the_gradients_of_one_process(tmp_path, assert_near):
    pytest.importorskip("torch.distributed.fsdp", reason="a build of torch without distributed")
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['one_of_two'](int(sys.argv[2]), sys.argv[3])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, __file__, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    net = Net()
    net(*inputs()).backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert set(grads) == {name for name, _ in net.named_parameters()}
        for name, grad in grads.items():
            assert_near(grad, net.get_parameter(name).grad, 1e-4)
