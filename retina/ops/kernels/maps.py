"""Norms, shifts and ReLU of maps in channels_last memory as Triton kernels: all levels of a pyramid in one launch, in
the type of the maps, with float32 inside. `retina.ops.kernels.map_forms` has the plain forms and says when these serve.

Nothing is added up by atomics, so the same input gives the same bits. A program takes some cells of one level; `table`
says which: [first program of each level, number of programs, cells of each level].
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192  # elements that a program holds at a time, with 8 warps
_CELLS_OF_NORM = 512  # that a program takes, of one image
_CELLS_OF_SHIFT = 256
_MOST_CHANNELS = 256  # of a shift's tile
_OPTIONS = {"num_warps": 8}


@lru_cache(maxsize=256)
def _table(cells: tuple[int, ...], cells_of_program: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """The table, and the number of programs of each level."""
    programs = [triton.cdiv(n, cells_of_program) for n in cells]
    numbers = [0, *accumulate(programs), *cells]
    with torch.inference_mode(False):
        table = torch.tensor(numbers, dtype=torch.int32)
        table = table.pin_memory() if device.type == "cuda" else table
        return table.to(device, non_blocking=True), programs


def _like(maps: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.channels_last) for x in maps]


def norm_forward(
    maps: Sequence[Tensor], masks: Sequence[Tensor], weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool
) -> tuple[list[Tensor], Tensor]:
    """The results, and for `norm_backward` mean, 1 / sqrt(var + eps) and number of elements [B L 3 G]."""
    table, programs, fixed = _norm_plan(maps, masks, groups, relu)
    images, results = len(maps[0]), _like(maps)
    parts = weight.new_empty((images, sum(programs), 3, groups), dtype=torch.float32)
    statistics = weight.new_empty((images, len(maps), 3, groups), dtype=torch.float32)
    grid, masks = (sum(programs), images), masks or maps
    splits = triton.next_power_of_2(max(programs))
    with torch.cuda.device_of(weight):
        _norm_parts[grid](tuple(maps), tuple(masks), parts, table, **fixed)
        _norm_apply[grid](
            tuple(maps), tuple(masks), tuple(results), parts, statistics, weight, bias, table, eps,
            splits=splits, **fixed,
        )  # fmt: skip
    return results, statistics


def norm_backward(
    grads: Sequence[Tensor],
    maps: Sequence[Tensor],
    masks: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the maps, and those of bias and weight [2 C]."""
    groups, channels = statistics.shape[-1], maps[0].shape[1]
    table, programs, fixed = _norm_plan(maps, masks, groups, relu)
    images, results = len(maps[0]), _like(maps)
    parts = weight.new_empty((images, sum(programs), 2, channels), dtype=torch.float32)
    sums = weight.new_empty((images, len(maps), 2, channels), dtype=torch.float32)
    grid, given = (sum(programs), images), (tuple(grads), tuple(maps), tuple(masks or maps))
    with torch.cuda.device_of(weight):
        _norm_sums[grid](*given, parts, statistics, weight, bias, table, **fixed)
        _add_parts[(len(maps), images)](parts, sums, table, size=2 * channels, levels=len(maps))
        _norm_slopes[grid](*given, tuple(results), sums, statistics, weight, bias, table, **fixed)
    return results, sums.sum(dim=(0, 1))


def _norm_plan(
    maps: Sequence[Tensor], masks: Sequence[Tensor], groups: int, relu: bool
) -> tuple[Tensor, list[int], dict[str, Any]]:
    channels = maps[0].shape[1]
    cells = tuple(x.shape[2] * x.shape[3] for x in maps)
    table, programs = _table(cells, _CELLS_OF_NORM, maps[0].device)
    rows = max(1, _TILE // channels)
    fixed = {"levels": len(maps), "groups": groups, "width": channels // groups, "rows": rows, "relu": relu}
    return table, programs, {**fixed, "steps": triton.cdiv(_CELLS_OF_NORM, rows), "masked": bool(masks), **_OPTIONS}


def shift_forward(
    maps: Sequence[Tensor],
    masks: Sequence[Tensor],
    residuals: Sequence[Tensor],
    norm: Sequence[Tensor],
    eps: float,
    residual_norm: Sequence[Tensor],
    residual_eps: float,
    relu: bool,
) -> list[Tensor]:
    """norm: a bias alone, or weight, bias, mean and variance; the same of the residuals, or nothing."""
    table, programs, fixed = _shift_plan(maps, masks, norm, residual_norm, relu)
    results = _like(maps)
    grid = (sum(programs), triton.cdiv(fixed["channels"], fixed["width"]))
    with torch.cuda.device_of(norm[0]):
        _shift[grid](
            tuple(maps), tuple(masks or maps), tuple(residuals or maps), tuple(results), _four(norm),
            _four(residual_norm or norm), table, eps, residual_eps, added=bool(residuals), **fixed,
        )  # fmt: skip
    return results


def shift_backward(
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Sequence[Tensor],
    eps: float,
    residual_norm: Sequence[Tensor],
    residual_eps: float,
    wanted: Sequence[bool],
    relu: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients of maps, residuals and bias, those that are `wanted`; those of residuals are none where they are
    the same as those of maps.

    results: of `shift_forward`, looked at with `relu` alone."""
    table, programs, fixed = _shift_plan(grads, masks, norm, residual_norm, relu)
    channels = fixed["channels"]
    slopes = _like(grads)
    two = wanted[1] and (fixed["scaled"] or fixed["added_scaled"])
    others = _like(grads) if two else slopes
    parts = norm[0].new_empty((sum(programs) if wanted[2] else 0, channels), dtype=torch.float32)
    grid = (sum(programs), triton.cdiv(channels, fixed["width"]))
    with torch.cuda.device_of(parts):
        _shift_slopes[grid](
            tuple(grads), tuple(results or grads), tuple(masks or grads), tuple(slopes), tuple(others), _four(norm),
            _four(residual_norm or norm), parts, table, eps, residual_eps, two=two, summed=wanted[2], **fixed,
        )  # fmt: skip
    return slopes, others if two else [], parts.sum(dim=0) if wanted[2] else parts.new_empty(channels)


def _four(norm: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(norm) if len(norm) == 4 else (norm[0],) * 4


def _shift_plan(
    maps: Sequence[Tensor],
    masks: Sequence[Tensor],
    norm: Sequence[Tensor],
    residual_norm: Sequence[Tensor],
    relu: bool,
) -> tuple[Tensor, list[int], dict[str, Any]]:
    channels = maps[0].shape[1]
    cells = tuple(x.shape[0] * x.shape[2] * x.shape[3] for x in maps)
    table, programs = _table(cells, _CELLS_OF_SHIFT, maps[0].device)
    width = min(triton.next_power_of_2(channels), _MOST_CHANNELS)
    rows = min(_CELLS_OF_SHIFT, _TILE // width)
    fixed = {"levels": len(maps), "channels": channels, "width": width, "rows": rows, "relu": relu}
    fixed |= {"steps": _CELLS_OF_SHIFT // rows, "masked": bool(masks)}
    return table, programs, {**fixed, "scaled": len(norm) == 4, "added_scaled": bool(residual_norm), **_OPTIONS}


@triton.jit
@no_type_check
def _place(table, program, levels: tl.constexpr):
    """Level of a program, its number within the level, and the cells of the level."""
    level = 0
    for i in tl.static_range(1, levels):
        level += (program >= tl.load(table + i)).to(tl.int32)
    return level, program - tl.load(table + level), tl.load(table + levels + 1 + level)


@triton.jit
@no_type_check
def _of_level(maps, level, levels: tl.constexpr):
    chosen = maps[0]
    for i in tl.static_range(1, levels):
        if level == i:
            chosen = maps[i]
    return chosen


@triton.jit
@no_type_check
def _cells(mask, image, cells, first, rows: tl.constexpr, masked: tl.constexpr):
    """Numbers of some cells of an image, whether they exist, and their weight: 1 within the content, else 0."""
    cell = first + tl.arange(0, rows)
    exists = cell < cells
    weight = exists.to(tl.float32)
    if masked:
        weight = tl.load(mask + image.to(tl.int64) * cells + cell, exists, 0.0).to(tl.float32)
    return cell, exists, weight


@triton.jit
@no_type_check
def _channels(groups: tl.constexpr, width: tl.constexpr):
    return tl.arange(0, groups)[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
@no_type_check
def _norm_parts(
    maps, masks, parts, table,
    levels: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, steps: tl.constexpr,
    relu: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared differences from the mean, of each group in the cells of a program.

    Tile by tile: differences from a mean of their own lose nothing where the mean is large (Chan, Golub and LeVeque,
    Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979)."""
    program, image = tl.program_id(0), tl.program_id(1)
    level, number, cells = _place(table, program, levels)
    x, mask = _of_level(maps, level, levels), _of_level(masks, level, levels)
    channel = _channels(groups, width)[None]
    count = 0.0
    mean = tl.zeros((groups,), tl.float32)
    squares = tl.zeros((groups,), tl.float32)
    for step in range(steps):
        cell, exists, weight = _cells(mask, image, cells, (number * steps + step) * rows, rows, masked)
        place = (image.to(tl.int64) * cells + cell)[:, None, None] * (groups * width) + channel
        value = tl.load(x + place, exists[:, None, None], 0.0).to(tl.float32)
        weight = weight[:, None, None]
        here = tl.sum(weight) * width
        own = tl.sum(tl.sum(value * weight, axis=2), axis=0) / tl.maximum(here, 1.0)
        difference = (value - own[None, :, None]) * weight
        total = tl.maximum(count + here, 1.0)
        step_of_mean = own - mean
        squares += tl.sum(tl.sum(difference * difference, axis=2), axis=0)
        squares += step_of_mean * step_of_mean * (count * here / total)
        mean += step_of_mean * (here / total)
        count += here
    start = parts + ((image * tl.num_programs(0) + program) * 3) * groups + tl.arange(0, groups)
    tl.store(start, count + tl.zeros((groups,), tl.float32))
    tl.store(start + groups, mean)
    tl.store(start + 2 * groups, squares)


@triton.jit
@no_type_check
def _norm_apply(
    maps, masks, results, parts, statistics, weights, biases, table, eps,
    splits: tl.constexpr, levels: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
    steps: tl.constexpr, relu: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    program, image = tl.program_id(0), tl.program_id(1)
    level, number, cells = _place(table, program, levels)
    first, last = tl.load(table + level), tl.load(table + level + 1)
    part = first + tl.arange(0, splits)
    start = ((image * tl.num_programs(0) + part) * 3)[:, None] * groups + tl.arange(0, groups)[None]
    there = (part < last)[:, None]
    counts = tl.load(parts + start, there, 0.0)
    means = tl.load(parts + start + groups, there, 0.0)
    count = tl.maximum(tl.sum(counts, axis=0), 1.0)
    mean = tl.sum(counts * means, axis=0) / count
    difference = means - mean[None]
    squares = tl.load(parts + start + 2 * groups, there, 0.0) + counts * difference * difference
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / count + eps)
    if number == 0:
        saved = statistics + ((image * levels + level) * 3) * groups + tl.arange(0, groups)
        tl.store(saved, mean)
        tl.store(saved + groups, rstd)
        tl.store(saved + 2 * groups, count)
    x, mask, y = _of_level(maps, level, levels), _of_level(masks, level, levels), _of_level(results, level, levels)
    channel = _channels(groups, width)
    factor = tl.load(weights + channel).to(tl.float32) * rstd[:, None]
    bias = tl.load(biases + channel).to(tl.float32)
    for step in range(steps):
        cell, exists, weight = _cells(mask, image, cells, (number * steps + step) * rows, rows, masked)
        place = (image.to(tl.int64) * cells + cell)[:, None, None] * (groups * width) + channel[None]
        value = tl.load(x + place, exists[:, None, None], 0.0).to(tl.float32)
        value = (value - mean[None, :, None]) * factor[None] + bias[None]
        if relu:
            value = tl.where(value <= 0, 0.0, value)  # NaN stays
        if masked:
            value = value * weight[:, None, None]
        tl.store(y + place, value.to(y.dtype.element_ty), exists[:, None, None])


@triton.jit
@no_type_check
def _slope(
    grads, x, mask, image, cells, first, mean, rstd, gamma, beta,
    groups: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, relu: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Of some cells the place, whether they exist, their weight, their normalised values, and the gradient behind mask
    and ReLU, whose sign is computed again."""
    cell, exists, weight = _cells(mask, image, cells, first, rows, masked)
    place = (image.to(tl.int64) * cells + cell)[:, None, None] * (groups * width) + _channels(groups, width)[None]
    value = tl.load(x + place, exists[:, None, None], 0.0).to(tl.float32)
    value = (value - mean[None, :, None]) * rstd[None, :, None]
    slope = tl.load(grads + place, exists[:, None, None], 0.0).to(tl.float32)
    if masked:
        slope = slope * weight[:, None, None]
    if relu:
        slope = tl.where(value * gamma[None] + beta[None] <= 0, 0.0, slope)
    return place, exists, weight, value, slope


@triton.jit
@no_type_check
def _norm_sums(
    grads, maps, masks, parts, statistics, weights, biases, table,
    levels: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, steps: tl.constexpr,
    relu: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of its products with normalised values, of each channel in the cells of a program."""
    program, image = tl.program_id(0), tl.program_id(1)
    level, number, cells = _place(table, program, levels)
    grad, x, mask = _of_level(grads, level, levels), _of_level(maps, level, levels), _of_level(masks, level, levels)
    saved = statistics + ((image * levels + level) * 3) * groups + tl.arange(0, groups)
    mean, rstd = tl.load(saved), tl.load(saved + groups)
    channel = _channels(groups, width)
    gamma, beta = tl.load(weights + channel).to(tl.float32), tl.load(biases + channel).to(tl.float32)
    sums = tl.zeros((groups, width), tl.float32)
    products = tl.zeros((groups, width), tl.float32)
    for step in range(steps):
        first = (number * steps + step) * rows
        _, _, _, value, slope = _slope(
            grad, x, mask, image, cells, first, mean, rstd, gamma, beta, groups, width, rows, relu, masked
        )
        sums += tl.sum(slope, axis=0)
        products += tl.sum(slope * value, axis=0)
    start = parts + ((image * tl.num_programs(0) + program) * 2) * groups * width + channel
    tl.store(start, sums)
    tl.store(start + groups * width, products)


@triton.jit
@no_type_check
def _add_parts(parts, sums, table, size: tl.constexpr, levels: tl.constexpr):
    """The sum over the programs of a level."""
    level, image = tl.program_id(0), tl.program_id(1)
    first, last, programs = tl.load(table + level), tl.load(table + level + 1), tl.load(table + levels)
    place = tl.arange(0, size)
    total = tl.zeros((size,), tl.float32)
    for part in range(first, last):
        total += tl.load(parts + (image * programs + part) * size + place)
    tl.store(sums + (image * levels + level) * size + place, total)


@triton.jit
@no_type_check
def _norm_slopes(
    grads, maps, masks, results, sums, statistics, weights, biases, table,
    levels: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, steps: tl.constexpr,
    relu: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """With g the gradient behind mask and ReLU, v normalised, n the elements of a group, r = 1 / sqrt(var + eps):
    dx = r (weight g - (sum(weight g) + v sum(weight g v)) / n) within the content."""
    program, image = tl.program_id(0), tl.program_id(1)
    level, number, cells = _place(table, program, levels)
    grad, x, mask = _of_level(grads, level, levels), _of_level(maps, level, levels), _of_level(masks, level, levels)
    out = _of_level(results, level, levels)
    saved = statistics + ((image * levels + level) * 3) * groups + tl.arange(0, groups)
    mean, rstd = tl.load(saved), tl.load(saved + groups)
    channel = _channels(groups, width)
    gamma, beta = tl.load(weights + channel).to(tl.float32), tl.load(biases + channel).to(tl.float32)
    count = tl.load(saved + 2 * groups)
    total = sums + ((image * levels + level) * 2) * groups * width + channel
    of_slope = tl.sum(gamma * tl.load(total), axis=1) / count
    of_product = tl.sum(gamma * tl.load(total + groups * width), axis=1) / count
    for step in range(steps):
        start = (number * steps + step) * rows
        place, exists, weight, value, slope = _slope(
            grad, x, mask, image, cells, start, mean, rstd, gamma, beta, groups, width, rows, relu, masked
        )
        slope = slope * gamma[None] - of_slope[None, :, None] - value * of_product[None, :, None]
        slope = slope * rstd[None, :, None]
        if masked:
            slope = slope * weight[:, None, None]
        tl.store(out + place, slope.to(out.dtype.element_ty), exists[:, None, None])


@triton.jit
@no_type_check
def _scale_and_shift(norm, eps, channel, exists, scaled: tl.constexpr):
    """Of weight, bias, mean and variance; of a bias alone where it is not `scaled`."""
    shift = tl.load(norm[1] + channel, exists, 0.0).to(tl.float32)
    scale = shift
    if scaled:
        scale = tl.rsqrt(tl.load(norm[3] + channel, exists, 1.0).to(tl.float32) + eps)
        scale = scale * tl.load(norm[0] + channel, exists, 0.0).to(tl.float32)
        shift = shift - scale * tl.load(norm[2] + channel, exists, 0.0).to(tl.float32)
    return scale, shift


@triton.jit
@no_type_check
def _shift(
    maps, masks, residuals, results, norm, residual_norm, table, eps, residual_eps, added: tl.constexpr,
    levels: tl.constexpr, channels: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, steps: tl.constexpr,
    relu: tl.constexpr, masked: tl.constexpr, scaled: tl.constexpr, added_scaled: tl.constexpr,
):  # fmt: skip
    level, number, cells = _place(table, tl.program_id(0), levels)
    x, mask = _of_level(maps, level, levels), _of_level(masks, level, levels)
    residual, y = _of_level(residuals, level, levels), _of_level(results, level, levels)
    channel = tl.program_id(1) * width + tl.arange(0, width)
    exists = channel < channels
    scale, shift = _scale_and_shift(norm, eps, channel, exists, scaled)
    other, other_shift = _scale_and_shift(residual_norm, residual_eps, channel, exists, added_scaled)
    if added_scaled:
        shift = shift + other_shift
    for step in range(steps):
        cell = (number * steps + step) * rows + tl.arange(0, rows)
        there = (cell < cells)[:, None] & exists[None]
        place = cell.to(tl.int64)[:, None] * channels + channel[None]
        value = tl.load(x + place, there, 0.0).to(tl.float32)
        if scaled:
            value = value * scale[None]
        value = value + shift[None]
        if added:
            more = tl.load(residual + place, there, 0.0).to(tl.float32)
            if added_scaled:
                more = more * other[None]
            value = value + more
        if relu:
            value = tl.where(value <= 0, 0.0, value)  # NaN stays
        if masked:
            value = value * tl.load(mask + cell, cell < cells, 0.0).to(tl.float32)[:, None]
        tl.store(y + place, value.to(y.dtype.element_ty), there)


@triton.jit
@no_type_check
def _shift_slopes(
    grads, results, masks, slopes, others, norm, residual_norm, parts, table, eps, residual_eps,
    two: tl.constexpr, summed: tl.constexpr,
    levels: tl.constexpr, channels: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, steps: tl.constexpr,
    relu: tl.constexpr, masked: tl.constexpr, scaled: tl.constexpr, added_scaled: tl.constexpr,
):  # fmt: skip
    level, number, cells = _place(table, tl.program_id(0), levels)
    grad, y = _of_level(grads, level, levels), _of_level(results, level, levels)
    mask = _of_level(masks, level, levels)
    out, second = _of_level(slopes, level, levels), _of_level(others, level, levels)
    channel = tl.program_id(1) * width + tl.arange(0, width)
    exists = channel < channels
    scale, _ = _scale_and_shift(norm, eps, channel, exists, scaled)
    other, _ = _scale_and_shift(residual_norm, residual_eps, channel, exists, added_scaled)
    total = tl.zeros((width,), tl.float32)
    for step in range(steps):
        cell = (number * steps + step) * rows + tl.arange(0, rows)
        there = (cell < cells)[:, None] & exists[None]
        place = cell.to(tl.int64)[:, None] * channels + channel[None]
        slope = tl.load(grad + place, there, 0.0).to(tl.float32)
        if relu:  # beyond the content the result is 0 too
            slope = tl.where(tl.load(y + place, there, 0.0) <= 0, 0.0, slope)
        elif masked:
            slope = slope * tl.load(mask + cell, cell < cells, 0.0).to(tl.float32)[:, None]
        if summed:
            total += tl.sum(slope, axis=0)
        if two:
            more = slope
            if added_scaled:
                more = slope * other[None]
            tl.store(second + place, more.to(second.dtype.element_ty), there)
        if scaled:
            slope = slope * scale[None]
        tl.store(out + place, slope.to(out.dtype.element_ty), there)
    if summed:
        tl.store(parts + tl.program_id(0) * channels + channel, total, exists)
