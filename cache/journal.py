"""What a long stage has found so far, a line for each item, so that a killed one goes on where it was."""
# A journal is a shortcut, like a snapshot: one that is missing, of another task or damaged costs time and nothing else.
# A line is a checksum and JSON; a line that was not written to its end counts as not there, and so do those behind it.

import json
import logging
import os
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from cache.files import canonical_json, file_error

logger = logging.getLogger("altopt")


class Journal:
    """Items of the task that ``key`` stands for (stage, inputs, config); ResourceError when there is no room."""
    # Go through ``kept`` to its end, then ``append``: what stands behind the last good item is cut off there.

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._output: FileIO | None = None

    def kept(self) -> Iterator[Any]:
        """Give the items that an earlier process appended, in order; what cannot be used is cut off."""
        good = 0
        if self.path.is_file():
            with self.path.open("rb") as file:
                if _decoded(header := file.readline()) == self.key:
                    good = len(header)
                    for line in file:
                        if (item := _decoded(line)) is None:
                            break
                        good += len(line)
                        yield item
                else:
                    logger.info("%s is of another task: starting at the beginning", self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._output = FileIO(self.path, "ab")
            os.truncate(self.path, good)  # or new lines would stand behind a torn one, and be lost with it
        except OSError as error:
            raise file_error(self.path, error, "written") from error
        if not good:
            self.append(self.key)

    def append(self, item: object) -> None:
        """Keep one more item: JSON-able, not None."""
        assert self._output is not None
        try:
            text = canonical_json(item).encode()
            line = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
            while line:
                line = line[self._output.write(line) :]
        except OSError as error:
            raise file_error(self.path, error, "written") from error

    def close(self) -> None:
        """Close the file; it stays for the next process."""
        if self._output is not None:
            self._output.close()

    def remove(self) -> None:
        """Remove the journal of a task that is done."""
        self.close()
        self.path.unlink(missing_ok=True)


def _decoded(line: bytes) -> object:
    """Return the item of a line; None when it is not whole."""
    checksum, _, text = line[:-1].partition(b" ")
    whole = line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text)
    return json.loads(text) if whole else None
