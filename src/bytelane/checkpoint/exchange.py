"""Put a finished folder in the place of another one, in one step where the system has one.

Two renames, the old folder away and the new one in, leave a moment without either; a process killed there would take
the user's checkpoint with it. Linux can exchange two names at once (`renameat2` with `RENAME_EXCHANGE`): whatever
happens, the name leads to the old folder or to the new one. Where the system or the file system cannot, the two renames
remain, and only a kill within their microseconds finds the old folder under another name beside the target.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import uuid
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


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
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    target.rename(old)
    try:
        staged.rename(target)
    except BaseException:  # Ctrl-C between the two renames must not leave the user without the old checkpoint
        old.rename(target)
        raise
    shutil.rmtree(old)
