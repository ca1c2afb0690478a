"""What is made belongs to whom its folder says, and is what the library would have written."""

import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from liftdist import files, safetensors_io
from liftdist.runs import selections

USER = 40001


def acl(user):
    """A POSIX ACL as the kernel keeps it: the owner may do all, ``user`` all, the group read, others nothing."""
    entries = [(0x01, 7, 2**32 - 1), (0x02, 7, user), (0x04, 5, 2**32 - 1), (0x10, 7, 2**32 - 1), (0x20, 0, 2**32 - 1)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.fixture
def shared(tmp_path):
    """A folder whose default ACL gives what is made in it to a user, whatever the umask of who makes it; umask 077."""
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl(USER))
    except OSError as error:
        pytest.skip(f"needs a file system with ACLs: {error.strerror}")
    before = os.umask(0o077)
    yield tmp_path
    os.umask(before)


def make_folder(path):
    with files.new_folder(path) as folder:
        (folder / "inside").write_text("")


MAKERS = {
    "written": lambda path: files.write(path, "text"),
    "created": lambda path: files.create(path, "text"),
    "appended": lambda path: files.open_to_append(path).close(),
    "a folder": make_folder,
    "a real folder": files.real_folder,
    "tensors": lambda path: safetensors_io.save({"a": torch.ones(3)}, path),
    "a selection": lambda path: selections.write(path, {"a": torch.arange(3)}),
    "a copy of a private folder": lambda path: copy_private(path),
}


def copy_private(path):
    source = path.with_name("private")
    source.mkdir(mode=0o700)
    (source / "file").touch(mode=0o600)
    os.removexattr(source, "system.posix_acl_default")
    files.copy(source, path)


@pytest.mark.parametrize("how", MAKERS)
def test_a_default_acl_decides_and_not_the_umask(how, shared):
    path = shared / "made"
    MAKERS[how](path)
    for made in [path, *path.rglob("*")]:
        given = os.getxattr(made, "system.posix_acl_access")
        entries = {tag: (perm, user) for tag, perm, user in struct.iter_unpack("<HHI", given[4:])}
        assert entries[0x02] == (7, USER)
        mask = entries[0x10][0]  # limits what the user gets
        assert mask == (7 if made.is_dir() else 6), made
        assert stat.S_IMODE(made.stat().st_mode) & 0o007 == 0


def test_what_replaces_a_file_keeps_its_acl(shared):
    old, new = shared / "old", shared / "new"
    for path in (old, new):
        path.touch()
    os.setxattr(old, "system.posix_acl_access", acl(USER + 1))
    old.chmod(0o640)
    files.belong_like(new, old)
    kept = [os.getxattr(path, "system.posix_acl_access") for path in (old, new)]
    assert kept[0] == kept[1]
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"text": 'a "quoted" é \\ {}'}])
def test_a_file_of_tensors_is_what_the_library_writes(metadata, tmp_path):
    tensors = {
        f"{dtype}".replace("torch.", "of é "): torch.arange(7).to(dtype) for dtype in safetensors_io.DTYPES.values()
    }
    tensors |= {f"{name} twice": tensor.clone() for name, tensor in tensors.items()}
    tensors |= {
        "a scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "B": torch.ones(2, 3),
        "a": torch.ones(5, 1).half(),
    }
    save_file(tensors, tmp_path / "theirs", metadata)
    safetensors_io.save(tensors, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    turned = torch.arange(6.0).view(2, 3).T
    safetensors_io.save({"turned": turned, "every other": turned[::2]}, tmp_path / "views")
    assert load_file(tmp_path / "views")["turned"].equal(turned)
    assert load_file(tmp_path / "views")["every other"].equal(turned[::2])


@pytest.mark.parametrize("number", [3, 2**20])  # a few are written when the file is closed
def test_a_file_of_tensors_that_cannot_be_written_is_named(number):
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        safetensors_io.save({"a": torch.ones(number)}, full)
    assert caught.value.filename == str(full)
