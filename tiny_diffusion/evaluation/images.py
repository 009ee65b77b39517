"""What can be scored: an .npz with arr_0, a folder of images, a data set; drawn images come from `sampling`.

Each becomes one uint8 tensor.  Nothing in an .npz is executed.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class NamedImages:
    """name: as it is printed.  images: (N, C, H, W) uint8.  labels: (N,) int64, where they are known."""

    name: str
    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])
