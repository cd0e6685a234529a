"""gather_patches: the normalised pixels of chosen tokens, as rows for one GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from umt_kernels import reference
from umt_kernels.backend import KERNEL_DTYPES, next_power_of_2, triton
from umt_kernels.checks import check_id_values, check_ids, check_ints, check_tensors, sees_ids
from umt_kernels.dispatch import KernelOp, runs_kernel
from umt_kernels.launch import PLANS, Plan, as_is
from umt_kernels.sharding import Axes, is_distributed, on_shards

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

if triton is not None:
    import triton.language as tl

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Layout = Literal["BTHWC", "BTCHW", "BCTHW", "BHWC", "BCHW"]

_VIDEO = {"BHWC": "BTHWC", "BCHW": "BCTHW"}  # an image as a clip of one frame
_WEIGHT_AXES = {"BTHWC": (0, 2, 3, 4, 1), "BTCHW": (0, 2, 1, 3, 4)}  # from a convolution's weight to a clip's order
MOST_CHANNELS = 16
"""Most channels for the kernel, whose code has constants for each channel; more run the reference."""


def gather_patches(
    clip: Shaped[Tensor, "b ..."],
    patch_size: int | tuple[int, int],
    tubelet_size: int = 1,
    *,
    token_ids: Int[Tensor, "r m"] | None = None,
    halo: int | tuple[int, int] = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout | None = None,
    padded: bool = False,
) -> Float[Tensor, "r m f"]:
    """Pixels of the tokens `token_ids` (all tokens if None), one row per token.

    clip       a video or an image. Without `layout`: uint8 [B,T,H,W,3] or [B,H,W,3]; float [B,3,T,H,W] or [B,3,H,W].
    patch_size, halo  one number, or (height, width). The halo widens each window by these pixels on every side, so that
               windows overlap; the clip's border is replicated.
    token_ids  index of each token in the flattened (t, h, w) grid, int32 or int64. With r a multiple of b, sets
               0 .. r/b - 1 belong to clip 0, and so on.
    mean, std  per channel. Default: ImageNet's, applied to uint8 pixels / 255; none for floats. Floats are not divided.
    layout     order of the axes in memory, if it is another one or there are not three channels.
    padded     ids may be -1, which gives a row of zeros.

    Returns [R, M, F] in `dtype`, F = channels * tubelet * window, in the order of the clip's memory: (time, row,
    column, channel) of BTHWC, (channel, time, row, column) of BCTHW, (time, channel, row, column) of BTCHW.
    `weight_matrix` puts a convolution's weight into the same order. The clip gets no gradient.

    Raises TypeError for a dtype that does not fit, ValueError for a size that patches do not divide, an id out of
    range, tensors on two devices, or unless `mean` and `std` have one number per channel and `std` is positive.
    """
    key = _forward.key((clip, token_ids), (patch_size, tubelet_size, halo, mean, std, dtype, layout, padded))
    plan = PLANS.get(key)  # type: ignore[arg-type]
    if plan is not None:
        return planned_patches(plan, clip, token_ids)
    if is_distributed(clip, token_ids):
        axes: dict[str, Axes] = {"clip": (0,), "token_ids": (0,)}
        return on_shards(
            gather_patches, axes, ((0,),), clip=clip, patch_size=patch_size, tubelet_size=tubelet_size,
            token_ids=token_ids, halo=halo, mean=mean, std=std, dtype=dtype, layout=layout, padded=padded,
        )  # fmt: skip
    check_tensors(clip=clip, token_ids=token_ids)
    return checked_patches(clip, patch_size, tubelet_size, token_ids, halo, mean, std, dtype, layout, padded, key)


def planned_patches(plan: Plan, clip: Tensor, token_ids: Tensor | None) -> Tensor:
    """The rows, by the plan of an earlier call with the same key."""
    settings: tuple[Any, ...] = plan.inputs
    order, patch, tubelet, *_, padded = settings
    clip = clip if clip.dim() == 5 else clip.unsqueeze(order.index("T"))
    if token_ids is not None and sees_ids(token_ids):
        _check_tokens(clip, token_ids, order, patch, tubelet, padded)
    return _forward.planned(plan, clip.detach() if clip.requires_grad else clip, token_ids)


def checked_patches(
    clip: Tensor,
    patch_size: int | tuple[int, int],
    tubelet_size: int,
    token_ids: Tensor | None,
    halo: int | tuple[int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
    layout: str | None,
    padded: bool,
    key: tuple | None,
) -> Tensor:
    """Check the arguments and return the rows of tensors on one device. The plan is kept under `key`."""
    clip, order = as_video(clip, layout)
    patch, tubelet, around = _sizes(clip, order, patch_size, tubelet_size, halo)
    means, stds = _normalisation(clip, clip.shape[order.index("C")], mean, std)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype = {dtype}; rows are floats")
    if token_ids is not None:
        check_ids("token_ids", token_ids, clip.shape[0], sets=True)
        _check_tokens(clip, token_ids, order, patch, tubelet, padded)
    if not _runs_kernel(clip, dtype, means, patch, tubelet, around, token_ids):
        return reference.gather_patches(
            clip.detach(), (patch[0], patch[1]), tubelet, token_ids, (around[0], around[1]), means, stds, dtype, order,
            padded,
        )  # fmt: skip
    clip = clip.detach() if clip.requires_grad else clip
    return _forward(clip, token_ids, order, patch, tubelet, around, means or [], stds or [], dtype, padded, key=key)


def _check_tokens(clip: Tensor, token_ids: Tensor, order: str, patch: list[int], tubelet: int, padded: bool) -> None:
    tokens = _shape(clip, None, order, patch, tubelet, [0, 0])[1]
    check_id_values("token_ids", token_ids, tokens, "a clip has {} tokens", padded=padded)


def _sizes(
    clip: Tensor,
    layout: str,
    patch_size: int | tuple[int, int],
    tubelet_size: int,
    halo: int | tuple[int, int],
) -> tuple[list[int], int, list[int]]:
    """Patch, tubelet and halo as ints. Raises ValueError where they do not fit the clip."""
    (tubelet,) = check_ints(tubelet_size=tubelet_size)
    patch, around = as_pair("patch_size", patch_size), as_pair("halo", halo)
    for axis, step in zip("THW", (tubelet, *patch), strict=True):
        size = clip.shape[layout.index(axis)]
        if step < 1 or size % step or size == 0:
            raise ValueError(f"clip has {axis} = {size}, which is not a positive multiple of {step}")
    if around[0] < 0 or around[1] < 0:
        raise ValueError(f"halo = {halo}; it must be 0 or more")
    return patch, tubelet, around


def weight_matrix(
    weight: Float[Tensor, "d c ..."], clip: Shaped[Tensor, "b ..."], layout: Layout | None = None
) -> Float[Tensor, "d f"]:
    """A Conv3d's or Conv2d's weight as a matrix [D, F]: rows @ matrix.T embeds the rows of
    `gather_patches(clip, ..., layout=layout)`."""
    return as_matrix(weight, default_layout(clip) if layout is None else _VIDEO.get(layout, layout))


def as_matrix(weight: Tensor, order: str) -> Tensor:
    """`weight_matrix` for a video whose axes have this order."""
    weight = weight if weight.dim() == 5 else weight.unsqueeze(2)
    if order == "BCTHW":
        return weight.flatten(1)
    rows, channels, tubelet, height, width = weight.shape
    features = channels * tubelet * height * width
    return weight.permute(_WEIGHT_AXES[order]).reshape(rows, features)  # faster than flatten


def default_layout(clip: Tensor) -> str:
    """Layout of a video; without the T, of an image."""
    return "BTHWC" if clip.dtype == torch.uint8 else "BCTHW"


def as_video(clip: Tensor, layout: str | None) -> tuple[Tensor, str]:
    """The clip with a time axis, and the order of its five axes."""
    if clip.dtype != torch.uint8 and not clip.is_floating_point():
        raise TypeError(f"clip has dtype {clip.dtype}; give uint8 [B,T,H,W,3] or normalised float [B,3,T,H,W]")
    if layout is None:
        if clip.dim() not in (4, 5):
            raise ValueError(
                f"clip has shape {list(clip.shape)}; give uint8 [B,T,H,W,3] or float [B,3,T,H,W], or images without T"
            )
        video = default_layout(clip)
        layout = video if clip.dim() == 5 else video.replace("T", "")
        channels = clip.shape[layout.index("C")]
        if channels != 3:
            axes = ",".join(layout.replace("C", "3"))
            raise ValueError(
                f"clip has shape {list(clip.shape)}, {channels} channels; a {clip.dtype} clip is [{axes}], "
                f"others need layout="
            )
    elif layout not in ("BTHWC", "BTCHW", "BCTHW", "BHWC", "BCHW"):
        raise ValueError(f"layout = {layout!r}; give BTHWC, BTCHW, BCTHW, BHWC or BCHW")
    elif clip.dim() != len(layout):
        raise ValueError(f"clip has shape {list(clip.shape)}, but layout = {layout!r}")
    video = _VIDEO.get(layout, layout)
    return (clip if layout == video else clip.unsqueeze(video.index("T"))), video


def as_pair(name: str, size: int | tuple[int, int]) -> list[int]:
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise ValueError(f"{name} = {size}; give one number, or (height, width)")
        return check_ints(**{f"{name}[0]": size[0], f"{name}[1]": size[1]})
    return 2 * check_ints(**{name: size})


def _normalisation(
    clip: Tensor, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float] | None, list[float] | None]:
    if (mean is None) != (std is None):
        if channels != 3:
            raise ValueError(f"mean = {mean} and std = {std}; give both or neither")
        mean, std = (IMAGENET_MEAN if mean is None else mean), (IMAGENET_STD if std is None else std)
    if mean is None and clip.dtype == torch.uint8:
        if channels != 3:
            raise ValueError(f"clip has {channels} channels; give mean and std for each (ImageNet's are of three)")
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    if mean is None or std is None:
        return None, None
    if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
        number = "three numbers" if channels == 3 else f"{channels} numbers"
        raise ValueError(f"mean = {mean} and std = {std}; give {number} each, one per channel, of std positive ones")
    return [float(m) for m in mean], [float(s) for s in std]


def _runs_kernel(
    clip: Tensor,
    dtype: torch.dtype,
    mean: Sequence[float] | None,
    patch: list[int],
    tubelet: int,
    halo: list[int],
    token_ids: Tensor | None,
) -> bool:
    if dtype not in KERNEL_DTYPES or not runs_kernel("gather_patches", clip):
        return False
    rows = clip.numel() // (patch[0] * patch[1] * tubelet) if token_ids is None else token_ids.numel()
    lines = rows * tubelet * (patch[0] + 2 * halo[0])
    return lines < 2**31 - 2**16 and (mean is None or len(mean) <= MOST_CHANNELS)  # lines are counted in int32


def _shape(
    clip: Tensor, token_ids: Tensor | None, layout: str, patch: list[int], tubelet: int, halo: list[int]
) -> tuple[int, int, int]:
    channels, frames, height, width = (clip.shape[layout.index(axis)] for axis in "CTHW")
    features = channels * tubelet * (patch[0] + 2 * halo[0]) * (patch[1] + 2 * halo[1])
    if token_ids is not None:
        return *token_ids.shape, features
    return clip.shape[0], frames // tubelet * (height // patch[0]) * (width // patch[1]), features


def _prepare(
    clip: Tensor,
    token_ids: Tensor | None,
    layout: str,
    patch: list[int],
    tubelet: int,
    halo: list[int],
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    padded: bool,
) -> Plan:
    clip = readable(clip, layout)
    shape = _shape(clip, token_ids, layout, patch, tubelet, halo)
    settings: dict[str, Any] = config(layout, patch, tubelet, halo, clip.shape[layout.index("C")])
    lines = shape[0] * shape[1] * settings["LINES_PER_TOKEN"] if shape[2] else 0
    masks = 1 if token_ids is None else len(token_ids) // max(1, len(clip))
    numbers = (lines, shape[1], masks, *geometry(clip, layout, patch))
    settings = {
        "GATHER": token_ids is not None,
        "PADDED": padded and token_ids is not None,
        **normalisation(clip, mean, std),
        **settings,
    }
    return Plan(_kernel, (triton.cdiv(lines, settings["LINES"]),), numbers, settings, ((shape, dtype),))


def _launch(
    plan: Plan,
    clip: Tensor,
    token_ids: Tensor | None,
    layout: str,
    patch: list[int],
    tubelet: int,
    halo: list[int],
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    padded: bool,
) -> Tensor:
    (rows,) = plan.allocate(clip.device)
    plan.launch((readable(clip, layout), token_ids), (rows,))
    return rows


def readable(clip: Tensor, layout: str) -> Tensor:
    """The clip, copied unless the pixels of a line are contiguous."""
    *_, before, last = clip.stride()
    side_by_side = last == 1 and (layout != "BTHWC" or before == clip.shape[4])
    return clip if side_by_side else clip.contiguous()


def geometry(clip: Tensor, layout: str, patch: list[int]) -> tuple[int, ...]:
    """Height and width of the grid and of a frame; strides of sample, channel, time and line."""
    height, width = (clip.shape[layout.index(axis)] for axis in "HW")
    strides = (clip.stride(layout.index(axis)) for axis in "BCTH")
    return height // patch[0], width // patch[1], height, width, *strides


def normalisation(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Compile-time scale and shift of each channel, which normalise a pixel."""
    top = 255 if clip.dtype == torch.uint8 else 1
    scales = tuple(1 / (top * s) for s in std)
    return {"SCALES": scales, "SHIFTS": tuple(-m / s for m, s in zip(mean, std, strict=True)), "NORMALISE": bool(std)}


def config(layout: str, patch: Sequence[int], tubelet: int, halo: Sequence[int], channels: int) -> dict[str, int]:
    """Tile sizes. A line is a window's part of one row of the frame: all channels in BTHWC, else one channel."""
    interleaved = layout == "BTHWC"
    columns = (channels if interleaved else 1) * (patch[1] + 2 * halo[1])
    block = next_power_of_2(columns)
    tile = 1024 if halo[1] or patch[1] % 16 else 4096  # narrow loads need more address registers per element
    return {
        "INTERLEAVED": interleaved,
        "TIME_FIRST": layout == "BTCHW",
        "CHANNELS": channels,
        "PATCH_HEIGHT": patch[0],
        "PATCH_WIDTH": patch[1],
        "TUBELET": tubelet,
        "HALO_HEIGHT": halo[0],
        "HALO_WIDTH": halo[1],
        "COLUMNS": columns,
        "LINES_PER_TOKEN": tubelet * (patch[0] + 2 * halo[0]) * (1 if interleaved else channels),
        "LINES": max(1, tile // block),
        "BLOCK": block,
        "num_warps": 4,
    }


def _fake(clip, token_ids, layout, patch, tubelet, halo, mean, std, dtype, padded):
    return clip.new_empty(_shape(clip, token_ids, layout, patch, tubelet, halo), dtype=dtype)


_forward = KernelOp("gather_patches", _prepare, _launch, _fake, strided={"clip": as_is})


if triton is not None:

    @triton.jit
    def normalised(values, channel, SCALES: tl.constexpr, SHIFTS: tl.constexpr, CHANNELS: tl.constexpr):
        """Pixels of any dtype, normalised by their `channel`, as float32."""
        scale = tl.zeros_like(channel).to(tl.float32)
        shift = tl.zeros_like(channel).to(tl.float32)
        for index in tl.static_range(CHANNELS):
            scale = tl.where(channel == index, SCALES[index], scale)
            shift = tl.where(channel == index, SHIFTS[index], shift)
        return values.to(tl.float32) * scale + shift

    @triton.jit
    def _kernel(
        clip_ptr,
        ids_ptr,  # [R, M]
        rows_ptr,  # [R, M, LINES_PER_TOKEN * COLUMNS]
        lines,
        kept,
        masks,  # R / B
        grid_height,
        grid_width,
        height,
        width,
        stride_b,
        stride_c,
        stride_t,
        stride_h,
        GATHER: tl.constexpr,
        PADDED: tl.constexpr,
        SCALES: tl.constexpr,
        SHIFTS: tl.constexpr,
        NORMALISE: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        TIME_FIRST: tl.constexpr,
        CHANNELS: tl.constexpr,
        PATCH_HEIGHT: tl.constexpr,
        PATCH_WIDTH: tl.constexpr,
        TUBELET: tl.constexpr,
        HALO_HEIGHT: tl.constexpr,
        HALO_WIDTH: tl.constexpr,
        COLUMNS: tl.constexpr,
        LINES_PER_TOKEN: tl.constexpr,
        LINES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        WINDOW: tl.constexpr = PATCH_HEIGHT + 2 * HALO_HEIGHT
        line = tl.program_id(0) * LINES + tl.arange(0, LINES)
        column = tl.arange(0, BLOCK)
        here = line < lines
        mask = here[:, None] & (column < COLUMNS)[None, :]
        token = line // LINES_PER_TOKEN
        within = line - token * LINES_PER_TOKEN
        row_set = token // kept
        if GATHER:
            place = tl.load(ids_ptr + token, mask=here, other=0).to(tl.int32)
        else:
            place = token - row_set * kept
        read = mask
        if PADDED:
            read = mask & (place >= 0)[:, None]
        if INTERLEAVED:
            time = within // WINDOW
            channel = column % CHANNELS
        elif TIME_FIRST:
            time = within // (WINDOW * CHANNELS)
            channel = within // WINDOW % CHANNELS
        else:
            time = within // WINDOW % TUBELET
            channel = within // (WINDOW * TUBELET)
        frame = place // (grid_height * grid_width) * TUBELET + time
        y = place // grid_width % grid_height * PATCH_HEIGHT + within % WINDOW - HALO_HEIGHT
        x = place % grid_width * PATCH_WIDTH
        if HALO_HEIGHT > 0:
            y = tl.minimum(tl.maximum(y, 0), height - 1)
        start = (row_set // masks).to(tl.int64) * stride_b + frame.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h
        if INTERLEAVED:
            if HALO_WIDTH > 0:
                pixel = tl.minimum(tl.maximum(x[:, None] + (column // CHANNELS - HALO_WIDTH)[None, :], 0), width - 1)
                offset = start[:, None] + pixel * CHANNELS + (column % CHANNELS)[None, :]
            else:
                offset = start[:, None] + x[:, None] * CHANNELS + column[None, :]
        else:
            start += channel.to(tl.int64) * stride_c
            if HALO_WIDTH > 0:
                pixel = tl.minimum(tl.maximum(x[:, None] + (column - HALO_WIDTH)[None, :], 0), width - 1)
                offset = start[:, None] + pixel
            else:
                offset = start[:, None] + x[:, None] + column[None, :]
        values = tl.load(clip_ptr + offset, mask=read, other=0)
        if NORMALISE:
            channels = channel[None, :] if INTERLEAVED else channel[:, None]
            values = normalised(values, channels, SCALES, SHIFTS, CHANNELS)
        if PADDED:
            values = tl.where(read, values, 0)
        to = line.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(rows_ptr + to, values.to(rows_ptr.dtype.element_ty), mask=mask)
