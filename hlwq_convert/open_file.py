"""`hlwq_convert.open`: a file as a dictionary of tensors, read one at a time."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from numpy.typing import NDArray

from hlwq_formats.errors import Usage, escape
from hlwq_formats.file_set import open_set

from .decode import get_numpy

if TYPE_CHECKING:
    import torch


class OpenFile:
    """What `hlwq_convert.open` returns: a dict-like view of a file, or of a split set by any part or its
    folder, one tensor at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.reader = open_set(path)

    def keys(self) -> list[str]:
        """All tensor names, aliases included, in file order."""
        return list(self.reader.tensors)

    @overload
    def get_tensor(self, name: str, framework: Literal["np"] = "np") -> NDArray[Any]: ...
    @overload
    def get_tensor(self, name: str, framework: Literal["pt"]) -> torch.Tensor: ...
    def get_tensor(self, name: str, framework: Literal["np", "pt"] = "np") -> NDArray[Any] | torch.Tensor:
        """One tensor, verified, as NumPy ("np"; BF16 becomes float32) or torch ("pt", needs the extra torch)."""
        if framework == "np":
            return get_numpy(self.reader, name)
        if framework != "pt":
            raise Usage(f'framework is {escape(str(framework))}, expected "np" or "pt"')
        from .runtime.load import get_torch

        return get_torch(self.reader, name)

    def close(self) -> None:
        """Close the file."""
        self.reader.close()

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
