"""TensorBoard event files in ``tensorboard/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from liftdist import files
from liftdist.runs.layout import TENSORBOARD


class TensorBoard:
    def __init__(self, run_dir: Path, after: int | None) -> None:
        self._folder = files.real_folder(run_dir / TENSORBOARD)
        self._purge_step = None if after is None else after + 1  # else steps show twice after a resume
        self._writer: SummaryWriter | None = None

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            self._writer, self._purge_step = SummaryWriter(str(self._folder), purge_step=self._purge_step), None
        return self._writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        try:
            for tag, value in values.items():
                self._open().add_scalar(tag, value, step)
            self._open().flush()
        except OSError:
            self._writer = None  # a writer that has failed does not recover
            raise

    def text(self, tag: str, text: str) -> None:
        self._open().add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """``pixels`` ``[height, width, 3]`` uint8."""
        self._open().add_image(tag, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def start(run_dir: Path, after: int | None) -> TensorBoard:
    return TensorBoard(run_dir, after)
