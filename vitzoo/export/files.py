"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside a file to be written, and remove it afterwards whatever happens.

    It lies on the file system of the target, so that `publish` renames and copies nothing.

    Args:
        target: the file to be written in the end.

    Raises:
        OSError: the target is a folder, or its folder does not exist or cannot be written.
    """
    folder = target.parent
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the path is a folder; name a file in it", str(target))
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist; create it first", str(folder))
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "this is a file, not a folder to write into", str(folder))
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
    except OSError as error:
        reason = f"the folder cannot be written ({error.strerror}); choose another"
        raise type(error)(error.errno, reason, str(folder)) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(scratch: Path, target: Path) -> None:
    """Move what a scratch folder holds beside the target; the target itself, which names the rest, last.

    An older target is removed before the files that belong to it change: at no moment does one stand beside the files
    of another.

    Raises:
        OSError: a folder has the name of one of the files; nothing has then been moved.
    """
    files = sorted(scratch.iterdir(), key=lambda f: f.name == target.name)
    for file in files:
        if (target.parent / file.name).is_dir():
            raise IsADirectoryError(
                errno.EISDIR, "a folder has this name; choose another", str(target.parent / file.name)
            )
    if len(files) > 1:
        target.unlink(missing_ok=True)
    for file in files:
        os.replace(file, target.parent / file.name)


def write_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8 whole or not at all.

    Raises:
        OSError: as `scratch_folder`.
    """
    with scratch_folder(target) as scratch:
        (scratch / target.name).write_text(text, encoding="utf-8")
        publish(scratch, target)
