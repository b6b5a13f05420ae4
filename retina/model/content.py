"""Where the images of a batch lie on their common canvas, so that what is computed of one depends on it alone."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from retina.ops.kernels.map_forms import group_norm, norm_serves
from retina.ops.kernels.norm import normalize_content


class Content:
    """The cells that images cover on the maps of a network, from the top left corner of each.

    A map of stride s has ceil(H / s) x ceil(W / s) cells of a canvas H x W, and an image h x w covers ceil(h / s) x
    ceil(w / s) of them: as many as its map would have on a canvas of its own. So if a map is zero in all others, a
    convolution that pads with zeros sees the same around the image on every canvas."""

    def __init__(self, sizes: Int64[Tensor, "B 2"] | None, canvas: tuple[int, int]) -> None:
        """sizes: (height, width) of the images; None: each fills the canvas, and nothing here does anything. On a CPU
        that is also seen from the sizes: no device waits for it, and torch's own norms take a fifth of the time."""
        if sizes is not None and sizes.device.type == "cpu" and not torch.compiler.is_compiling():
            sizes = None if bool((sizes == sizes.new_tensor(canvas)).all()) else sizes
        self.sizes, self.canvas = sizes, canvas
        self._pixels: Tensor | None = None
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}

    def mask(self, stride: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "B 1 _ _"] | None:
        """1 in the cells that an image covers on a map of this stride, else 0; None if all images fill the canvas."""
        if self.sizes is None:
            return None
        if (stride, dtype) not in self._masks:
            self._masks[stride, dtype] = self._whole()[:, :, ::stride, ::stride].to(dtype).contiguous()
        return self._masks[stride, dtype]

    def _whole(self) -> Bool[Tensor, "B 1 H W"]:
        """1 in the pixels of images: every s-th of them is the corner of a cell of stride s."""
        if self._pixels is None:
            assert self.sizes is not None
            rows, columns = (
                torch.arange(side, device=self.sizes.device) < size[:, None]
                for side, size in zip(self.canvas, self.sizes.unbind(1), strict=True)
            )
            self._pixels = rows[:, None, :, None] & columns[:, None, None, :]
        return self._pixels

    def mask_of(self, x: Float[Tensor, "B C _ _"], stride: int) -> Float[Tensor, "B 1 _ _"] | None:
        """The mask in the type of a map, and in its size: a plugin's convolution that rounds down has a cell less."""
        mask = self.mask(stride, x.dtype)
        return None if mask is None else mask[..., : x.shape[2], : x.shape[3]]

    def keep(self, x: Float[Tensor, "B C _ _"], stride: int) -> Float[Tensor, "B C _ _"]:
        """`x` itself, with zeros written into the cells that no image covers."""
        if stride == 1 and self.sizes is not None:
            return x.mul_(self._whole())  # the largest map: its mask stays a bool
        mask = self.mask_of(x, stride)
        return x if mask is None else x.mul_(mask)


class GroupNorm(nn.GroupNorm):
    """A GroupNorm whose statistics are those of the cells where the mask is 1."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if norm_serves([x], self.num_groups):
            options = (self.weight, self.bias, self.num_groups, self.eps, False)
            return group_norm([x], [mask if mask is None else mask.to(x.dtype)], *options)[0]
        if mask is None and x.device.type != "cpu":
            return super().forward(x)
        if mask is None:  # torch's own takes three times as long in bfloat16, and twice in float32
            mask = x.new_ones((len(x), 1, *x.shape[2:]))
        return normalize_content(x, mask, self.weight, self.bias, groups=self.num_groups, eps=self.eps)[0]
