"""`metrics.csv` of a run folder: what was measured while training, a row a step and event."""

import csv
import io
import os
from pathlib import Path

from dreambooth.claims import Claim
from dreambooth.files import write_text


class MetricsFile:
    """`metrics.csv`: one row a step and event, columns as they come, readable at any moment.

    `step` is the number of optimiser steps done when the numbers were taken: the first loss stands at 1, the un-tuned base at 0.

    Args:
        path: of the file.
        claim: on its folder, of the process that writes; None for one that only reads.
    """

    def __init__(self, path: Path, claim: Claim | None = None) -> None:
        self.path, self.claim = path, claim
        self.columns = list(next(iter(self.read()), ["step"]))

    def read(self) -> list[dict[str, str]]:
        """Returns the rows as text by column; a row that was cut off by a crash is left out."""
        if not self.path.is_file():
            return []
        whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
        return [row for row in csv.DictReader(io.StringIO(whole + "\n", newline="")) if None not in row.values() and None not in row]

    def append(self, step: int, values: dict[str, float]) -> None:
        """Adds one row at once; a new column rewrites the file.

        Raises:
            ClaimLost: the folder is another process's by now; nothing is written.
        """
        if self.claim is not None:
            self.claim.check()  # the heartbeat asks the disk; here, at every step, only when it has not done so
        new = [key for key in values if key not in self.columns]
        if new:
            self.columns += new
            self._rewrite(self.read())
        elif not self._ends_whole():
            self._rewrite(self.read())  # a new file, or one whose last line a crash cut off
        with self.path.open("a", newline="", encoding="utf-8") as handle:
            csv.DictWriter(handle, self.columns).writerow({"step": step} | values)

    def truncate(self, step: int) -> None:
        """Drops what was written after `step`: a run that continues from there writes it again."""
        self._rewrite([row for row in self.read() if int(row["step"]) <= step])

    def _ends_whole(self) -> bool:
        """Tells whether the file is there and its last line complete; reads one byte, as every step of a training asks."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as handle:
            handle.seek(-1, os.SEEK_END)
            return handle.read(1) == b"\n"

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
