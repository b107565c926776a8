"""Who may do what through the overlay, and whose the results are. The daemon is root; its callers need not be."""

from __future__ import annotations

import os
import stat

import pytest

from tests.conftest import MountFactory, Tree
from tests.mounts import as_user

UID, GID, TEAM, STRANGER = 12345, 54321, 777, 12399


def owner(tree: Tree, name: str) -> tuple[int, int]:
    """Owner and group of a file as the source has them."""
    found = (tree.beneath / name).lstat()
    return found.st_uid, found.st_gid


def mode(tree: Tree, name: str) -> int:
    """Permission bits as the source has them."""
    return stat.S_IMODE((tree.beneath / name).lstat().st_mode)


MAKE_ALL = """
base = sys.argv[1]
os.close(os.open(f"{base}/file", os.O_CREAT | os.O_WRONLY, 0o666))
os.mkdir(f"{base}/dir", 0o777)
os.symlink("file", f"{base}/link")
os.mkfifo(f"{base}/fifo", 0o666)
"""


def test_what_a_user_makes_is_the_user_s(tree: Tree) -> None:
    tree.top.chmod(0o777)
    assert as_user(UID, GID, MAKE_ALL, tree.top) == ""
    for name in ("file", "dir", "link", "fifo"):
        assert owner(tree, name) == (UID, GID), name
        found = (tree.top / name).lstat()
        assert (found.st_uid, found.st_gid) == (UID, GID), name


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o027])
def test_the_umask_of_the_caller_counts(tree: Tree, umask: int) -> None:
    tree.top.chmod(0o777)
    as_user(UID, GID, MAKE_ALL, tree.top, umask=umask)
    assert mode(tree, "file") == 0o666 & ~umask
    assert mode(tree, "dir") == 0o777 & ~umask
    assert mode(tree, "fifo") == 0o666 & ~umask


def test_the_kernel_checks_permissions(tree: Tree) -> None:
    secret = tree.top / "secret"
    secret.write_text("secret")
    secret.chmod(0o600)
    (tree.top / "closed").mkdir(0o700)
    tries = """
base = sys.argv[1]
def tried(function, *arguments):
    try:
        function(*arguments)
        return "OK"
    except OSError as error:
        return errno.errorcode[error.errno]
print(*[
    tried(open, f"{base}/secret"),
    tried(open, f"{base}/secret", "r+"),
    tried(open, f"{base}/new", "w"),
    tried(os.mkdir, f"{base}/new"),
    tried(os.unlink, f"{base}/secret"),
    tried(os.rename, f"{base}/secret", f"{base}/new"),
    tried(os.chmod, f"{base}/secret", 0o666),
    tried(os.chown, f"{base}/secret", 12345, 54321),
    tried(os.utime, f"{base}/secret"),
    tried(os.truncate, f"{base}/secret", 0),
    tried(os.listdir, f"{base}/closed"),
    tried(os.stat, f"{base}/closed/x"),
    tried(os.setxattr, f"{base}/secret", "user.x", b""),
    tried(os.stat, f"{base}/secret"),
    os.access(f"{base}/secret", os.R_OK), os.access(f"{base}", os.R_OK | os.X_OK), os.access(f"{base}", os.W_OK),
])
"""
    assert as_user(UID, GID, tries, tree.top).split() == [
        "EACCES", "EACCES", "EACCES", "EACCES", "EACCES", "EACCES", "EPERM", "EPERM", "EACCES", "EACCES", "EACCES",
        "EACCES", "EACCES", "OK", "False", "True", "False",
    ]  # fmt: skip
    assert secret.read_text() == "secret"


def test_supplementary_groups_open_doors(tree: Tree) -> None:
    (tree.top / "shared").mkdir()
    os.chown(tree.top / "shared", 0, TEAM)
    (tree.top / "shared").chmod(0o770)
    write = 'open(sys.argv[1] + "/file", "w").write("data")'
    assert as_user(UID, GID, write, tree.top / "shared") == "EACCES"
    assert as_user(UID, GID, write, tree.top / "shared", groups=[5, TEAM]) == ""
    assert owner(tree, "shared/file") == (UID, GID)
    assert (tree.top / "shared/file").read_text() == "data"


def test_setgid_directories_pass_their_group_on(tree: Tree) -> None:
    """As the source does it: the same is done there, by the same user."""
    for base in (tree.top, tree.beneath):
        path = base / ("over" if base is tree.top else "under")
        path.mkdir()
        os.chown(path, 0, TEAM)
        path.chmod(0o2777)
        assert as_user(UID, GID, MAKE_ALL, path, umask=0o022) == ""
    for name in ("file", "dir", "link", "fifo"):
        assert owner(tree, f"over/{name}") == owner(tree, f"under/{name}"), name
        assert mode(tree, f"over/{name}") == mode(tree, f"under/{name}"), name


@pytest.mark.sources("directory")
def test_setgid_directories_on_a_plain_source(tree: Tree) -> None:
    top = tree.top / "team"
    top.mkdir()
    os.chown(top, 0, TEAM)
    top.chmod(0o2777)
    assert as_user(UID, GID, MAKE_ALL, top) == ""
    for name in ("file", "dir", "link", "fifo"):
        found = (top / name).lstat()
        assert (found.st_uid, found.st_gid) == (UID, TEAM), name
    assert stat.S_IMODE((top / "dir").stat().st_mode) == 0o2755


def test_sticky_directories_protect_others_files(tree: Tree) -> None:
    (tree.top / "tmp").mkdir()
    (tree.top / "tmp").chmod(0o1777)
    assert as_user(UID, GID, 'open(sys.argv[1] + "/mine", "w").close()', tree.top / "tmp") == ""
    remove = 'os.unlink(sys.argv[1] + "/mine")'
    assert as_user(STRANGER, GID, remove, tree.top / "tmp") == "EPERM"
    assert as_user(STRANGER, GID, 'os.rename(sys.argv[1] + "/mine", sys.argv[1] + "/x")', tree.top / "tmp") == "EPERM"
    assert as_user(UID, GID, remove, tree.top / "tmp") == ""


OVERWRITE = 'fd = os.open(sys.argv[1], os.O_WRONLY); os.write(fd, b"new"); os.close(fd)'


@pytest.mark.parametrize(
    "change",
    [
        OVERWRITE,
        "os.truncate(sys.argv[1], 1)",
        "os.close(os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC))",
        OVERWRITE.replace("O_WRONLY", "O_WRONLY | os.O_APPEND"),
    ],
    ids=["write", "truncate", "open-truncating", "append"],
)
def test_somebody_else_s_write_clears_setuid_and_setgid(tree: Tree, change: str) -> None:
    program = tree.top / "program"
    program.write_bytes(b"program")
    program.chmod(0o6777)
    assert as_user(UID, GID, change, program) == ""
    assert stat.S_IMODE(program.stat().st_mode) == 0o777
    assert mode(tree, "program") == 0o777


def test_an_owner_s_chown_and_chmod(tree: Tree) -> None:
    program = tree.top / "program"
    program.write_bytes(b"program")
    os.chown(program, UID, GID)
    program.chmod(0o6755)
    assert as_user(UID, GID, "os.chown(sys.argv[1], -1, 777)", program) == "EPERM"
    assert as_user(UID, GID, "os.chown(sys.argv[1], -1, 777)", program, groups=[TEAM]) == ""
    assert owner(tree, "program") == (UID, TEAM)
    assert mode(tree, "program") == 0o755, "chown by its owner clears both bits"
    assert as_user(UID, GID, "os.chmod(sys.argv[1], 0o2755)", program) == "", "not a member: the bit is dropped"
    assert mode(tree, "program") == 0o755


def test_setuid_programs_do_not_gain_rights(tree: Tree) -> None:
    """The mount is nosuid, as every FUSE mount is."""
    flags = os.statvfs(tree.top).f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV


def test_execution_needs_the_bit(tree: Tree) -> None:
    script = tree.top / "script"
    script.write_text("#!/bin/sh\necho ran\n")
    script.chmod(0o744)
    run = "sys.stdout.flush(); os.execv(sys.argv[1], [sys.argv[1]])"
    assert as_user(UID, GID, run, script) == "EACCES"
    script.chmod(0o755)
    assert as_user(UID, GID, run, script) == "ran"


def test_without_allow_other_only_the_mounting_user_gets_in(overlay_mount: MountFactory) -> None:
    mount = overlay_mount(allow_other="no")
    (mount.mountpoint / "file").touch()
    assert as_user(UID, GID, "os.stat(sys.argv[1])", mount.mountpoint / "file") == "EACCES"
