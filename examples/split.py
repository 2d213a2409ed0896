"""Split tars in SA-1B's layout into training images and held-out images, reproducibly.

    python examples/split.py clothes.tar coco.tar streets.tar --out data/ --group 'street_[^_]*_f?[0-9]{2}'

An image is held out if the SHA-256 of its name, as a fraction of its range, is below `--share`. The split is the same
on every machine and does not depend on the other images. `--group` keeps similar images together, such as frames of a
video: the part of the name that it matches is hashed instead of the name. Each NAME.tar becomes NAME-train.tar and
NAME-held-out.tar. Files are copied unchanged; existing tars are not overwritten.
"""

import argparse
import hashlib
import re
import sys
import tarfile
from pathlib import Path, PurePosixPath

from samlight_hf.data.sa1b import find_tars, tar_members
from samlight_hf.utils.atomic_files import atomic_write
from samlight_hf.utils.messages import make_console_safe


def main():
    make_console_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", nargs="+", help="tars, folders of tars or patterns")
    parser.add_argument("--out", type=Path, required=True, help="folder for the new tars")
    parser.add_argument("--share", type=float, default=0.1, help="share of the images held out (%(default)s)")
    parser.add_argument("--group", type=re.compile, metavar="REGEX", help="part of the name that similar images share")
    args = parser.parse_args()
    try:
        if not 0 < args.share < 1:
            raise ValueError(f"--share {args.share} must be above 0 and below 1.")
        args.out.mkdir(parents=True, exist_ok=True)
        for tar in find_tars(args.tars):
            split(tar, args.out, args.share, args.group)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def split(tar: Path, out: Path, share: float, group: re.Pattern | None):
    """Write the two parts of a tar.

    Raises:
        ValueError: For a damaged tar, and where a part exists already or would be empty.
    """
    parts: dict[bool, list[tarfile.TarInfo]] = {False: [], True: []}
    for member in tar_members(tar):
        parts[is_held_out(PurePosixPath(member.name).stem, share, group)].append(member)
    paths = {False: out / f"{tar.stem}-train.tar", True: out / f"{tar.stem}-held-out.tar"}
    for held_out, members in parts.items():
        if not members:
            raise ValueError(f"{tar}: {paths[held_out].name} would be empty. Choose another --share or --group.")
        if paths[held_out].exists():
            raise ValueError(f"{paths[held_out]} exists already. Move it away, or choose another --out.")
    for held_out, members in parts.items():
        atomic_write(paths[held_out], lambda path, members=members: copy(tar, members, path))
        print(f"{paths[held_out]}: {len({PurePosixPath(member.name).stem for member in members})} images")


def is_held_out(name: str, share: float, group: re.Pattern | None = None) -> bool:
    """Return whether the image with this name (without suffix) is held out."""
    match = group.search(name) if group else None
    digest = hashlib.sha256((match.group() if match else name).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def copy(tar: Path, members: list[tarfile.TarInfo], path: Path):
    """Copy these members of a tar to a new one."""
    with tarfile.open(tar) as source, tarfile.open(path, "w") as target:
        for member in members:
            target.addfile(member, source.extractfile(member))


if __name__ == "__main__":
    main()
