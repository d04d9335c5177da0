"""The image files of a folder, a zip or a tar archive, all three behind one interface, read without unpacking."""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# As torchvision's ImageFolder has them.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What macOS adds to the archives it makes: files named like the images, which are none.
_JUNK = "__MACOSX"
# How files of gzip, bzip2, xz and zstd begin.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class ImageFiles(ABC):
    """The files with an image's extension below a path, listed once, in an order that is the same on every machine.

    Hidden files and folders (a leading dot) and ``__MACOSX`` are left out. An object holds no open file: each read
    opens the archive by itself, so worker processes and threads share nothing and pickling is cheap.

    Attributes:
        path: the folder or archive.
        names: relative paths with ``/``, sorted part by part.
        folders: every folder, also those with no image in them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.folders: set[str] = set()

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of file ``names[index]``.

        Raises:
            ValueError: an archive gives other bytes than were put in.
            OSError: it cannot be read.
        """

    def full_name(self, index: int) -> str:
        """Folder or archive, and the name within it."""
        return str(self.path / self.names[index])

    def _keep(self, names: list[str], folders: list[str]) -> list[int]:
        """Fill ``names`` and ``folders`` from a raw listing; where in it each of ``names`` was."""
        paths = [PurePosixPath(name).parts for name in names]
        wanted = [place for place, parts in enumerate(paths) if _is_image(parts)]
        wanted.sort(key=lambda place: paths[place])
        self.names = ["/".join(paths[place]) for place in wanted]
        found = {PurePosixPath(name).parts for name in folders} | {parts[:-1] for parts in paths}
        found |= {parts[:depth] for parts in found for depth in range(1, len(parts))}
        self.folders = {"/".join(parts) for parts in found if parts and not _is_hidden(parts)}
        return wanted


def open_files(path: Path) -> ImageFiles:
    """List a folder, a zip or an uncompressed tar.

    Raises:
        ValueError: the file is no archive, or one whose files cannot be read one by one.
    """
    if path.is_dir():
        return Folder(path)
    if zipfile.is_zipfile(path):
        return Zip(path)
    if tarfile.is_tarfile(path):
        return Tar(path)
    raise ValueError(
        f"data: {path} is neither a folder nor a zip or tar archive; fetch it again if it is one that was cut off"
    )


class Folder(ImageFiles):
    """Files of a folder and all folders below it, through links too."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        names, folders = [], []
        for here, below, files in os.walk(path, followlinks=True):
            start = Path(here).relative_to(path)
            names += [(start / file).as_posix() for file in files]
            folders += [(start / folder).as_posix() for folder in below]
        self._keep(names, folders)

    def read(self, index: int) -> bytes:
        return (self.path / self.names[index]).read_bytes()


class _Member(NamedTuple):
    offset: int  # of a zip member's own header, of a tar member's bytes
    size: int  # as it lies in the archive
    method: int = zipfile.ZIP_STORED
    checksum: int = 0


class Zip(ImageFiles):
    """Members of a zip, stored or deflated; their checksums are compared at each read.

    Raises:
        ValueError: a member is encrypted or packed by another method.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"data: {path} is a damaged zip ({error}); fetch it again") from None
        files = [member for member in members if not member.is_dir()]
        kept = self._keep([member.filename for member in files], [one.filename for one in members if one.is_dir()])
        self._members: list[_Member] = []
        for member in (files[place] for place in kept):
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"data: {path / member.filename} is encrypted or packed by method {member.compress_type}; pack "
                    f"the images anew, stored (zip -0) or deflated"
                )
            entry = _Member(member.header_offset, member.compress_size, member.compress_type, member.CRC)
            self._members.append(entry)

    def read(self, index: int) -> bytes:
        offset, size, method, checksum = self._members[index]
        with self.path.open("rb") as file:
            file.seek(offset)
            header = file.read(30)
            if len(header) == 30:
                # The lengths of name and extra field stand here again, and may differ from those of the directory.
                name, extra = struct.unpack("<HH", header[26:])
                file.seek(name + extra, os.SEEK_CUR)
            content = file.read(size)
        try:
            content = zlib.decompress(content, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else content
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if zlib.crc32(content) != checksum:
            raise ValueError("its bytes do not match the zip's checksum")
        return content


class Tar(ImageFiles):
    """Members of an uncompressed tar. A tar inside it counts as a folder of that name, as ImageNet's training set has.

    Raises:
        ValueError: the archive is compressed or ends too early, or an image in it is a link.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        names: list[str] = []
        folders: list[str] = []
        members: list[_Member] = []

        def walk(archive: tarfile.TarFile, start: PurePosixPath, offset: int) -> None:
            for member in archive:
                name, begin = start / member.name, offset + member.offset_data
                if member.isdir():
                    folders.append(str(name))
                elif member.isfile() and name.suffix == ".tar":
                    with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                        walk(inner, name.with_suffix(""), begin)
                elif _is_image(name.parts) and (not member.isfile() or member.sparse):
                    raise ValueError(
                        f"data: {path / name} is a link or a sparse file; pack again with tar --dereference"
                    )
                elif member.isfile():
                    names.append(str(name))
                    members.append(_Member(begin, member.size))
            # tarfile takes a header it cannot read for the end, and what follows would be missing without a word.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no readable header at byte {offset + archive.offset}")

        try:
            with tarfile.open(path, mode="r:") as archive:
                walk(archive, PurePosixPath(), 0)
        except tarfile.ReadError as error:
            with path.open("rb") as file:
                compressed = file.read(6).startswith(_COMPRESSED)
            reason = f"is a damaged tar ({error}); fetch it again"
            if compressed:
                reason = "is a compressed tar, whose files cannot be read one by one; decompress it to a plain .tar"
            raise ValueError(f"data: {path} {reason}") from None
        self._members = [members[place] for place in self._keep(names, folders)]

    def read(self, index: int) -> bytes:
        member = self._members[index]
        with self.path.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith(".") or part == _JUNK for part in parts)


def _is_image(parts: tuple[str, ...]) -> bool:
    return parts[-1].lower().endswith(EXTENSIONS) and not _is_hidden(parts)
