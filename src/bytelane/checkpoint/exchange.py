"""Put a finished folder in the place of another one, in one step where the system has one.

Two renames, the old folder away and the new one in, leave a moment without either; a process killed there would take
the user's checkpoint with it. Linux can exchange two names at once (`renameat2` with `RENAME_EXCHANGE`): whatever
happens, the name leads to the old folder or to the new one. Where the system or the file system cannot, the two renames
remain, and only a kill within their microseconds finds the old folder under another name beside the target.

A killed process also leaves the folder it was writing, `.NAME.XXXXXXXX.partial`, beside the target. Writers hold a lock
on theirs, which ends with them whatever ends them, so the next write to that target can tell what is abandoned and
clears it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def _beside(target: Path, kind: str) -> Path:
    """A name of its own for a folder beside the target, on the same file system."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _locked(folder: Path, *, wait: bool) -> int | None:
    """A handle that holds a folder's lock; None where another process has it, or the folder has just gone.

    On a file system without locks the handle of a waiting caller holds none, and no other caller gets one.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if not wait:
            os.close(handle)
            return None
    return handle


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, to be filled and handed to `replace_folder`; gone at the end, whatever ends it.

    What killed processes left there for the same target is removed first.
    """
    _clear_abandoned(target)
    while True:
        staged = _beside(target, "partial")
        staged.mkdir()
        lock = _locked(staged, wait=True)
        if lock is not None and staged.exists():
            break
        if lock is not None:  # another writer took it for abandoned before it was locked
            os.close(lock)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(lock)


def _clear_abandoned(target: Path) -> None:
    """Remove the unfinished folders that killed processes left beside a target; those being written are locked."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.partial")
    for path in list(target.parent.iterdir()):
        if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        lock = _locked(path, wait=False)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two names; False where that is not to be had.

    Raises:
        OSError: it is, and failed.
    """
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(b))


def replace_folder(staged: Path, target: Path) -> None:
    """Make `target` the folder that `staged` is; what was there goes only after that.

    Args:
        staged: a finished folder beside the target.
        target: a folder, which may hold a checkpoint, or nothing.
    """
    if not target.exists() or not any(target.iterdir()):
        staged.rename(target)  # onto an empty folder too
        return
    if _exchanged(staged, target):
        shutil.rmtree(staged)  # which is the old folder now
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        staged.rename(target)
    except BaseException:  # Ctrl-C between the two renames must not leave the user without the old checkpoint
        old.rename(target)
        raise
    shutil.rmtree(old)
