"""Prompts and reference images of the usual evaluation sets, from their official files on disk.

coco2014  --captions captions_val2014.json --images val2014   30,000 of the 40,504 images, one caption each
coco2017  --captions captions_val2017.json --images val2017   all 5,000 images, one caption each
cc3m      --captions Validation_GCC-1.1.0-Validation.tsv --images DIR   every row whose image is there, as DIR/<row>.jpg
imagenet  class numbers for `alter sample --labels`: every class in turn, so that 50,000 samples hold 50 of each

Images of coco2014 are drawn by numpy's default_rng(0) from the ids in ascending order; a caption is the one with the
image's lowest annotation id. Reference images are the centre square, resized to --size (bicubic, antialiased).
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.files import check_writable, folder_fault, read_text
from .options import check_least, user_path

COUNT = {"coco2014": 30_000, "coco2017": 5_000}
MOST_NAMED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", choices=("coco2014", "coco2017", "cc3m", "imagenet"))
    parser.add_argument("--captions", type=user_path, metavar="FILE")
    parser.add_argument("--images", type=user_path, metavar="DIR")
    parser.add_argument("--count", type=int, help="images (default: the protocol's)")
    parser.add_argument("--size", type=int, default=256, help="side of the reference images (default 256)")
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder to make")


def run(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "count", "size")
    out: Path = arguments.out
    if out.exists():
        raise InputError(f"--out {out}: exists: choose another folder")
    if arguments.set != "imagenet":
        if arguments.captions is None or arguments.images is None:
            raise InputError(f"{arguments.set}: needs --captions and --images")
        fault = folder_fault(arguments.images)
        if fault is not None:
            raise InputError(f"--images {arguments.images}: {fault}: name the folder of the set's images")
    check_writable(out, "--out", folder=True)
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if arguments.set == "imagenet":
            (partial / "labels.txt").write_text("".join(f"{label}\n" for label in range(1000)), encoding="utf-8")
        else:
            _write_pairs(arguments, partial, _cc3m(arguments) if arguments.set == "cc3m" else _coco(arguments))
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"written to {out}")


def _coco(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Chosen images with their caption: id, file and caption."""
    import numpy as np

    try:
        content = json.loads(read_text(arguments.captions, "--captions"))
    except json.JSONDecodeError as error:
        raise InputError(f"--captions {arguments.captions}: no JSON ({error}): name the set's official file") from None
    try:
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions: dict[int, str] = {}
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            captions.setdefault(annotation["image_id"], " ".join(annotation["caption"].split()))
        ids = sorted(files.keys() & captions.keys())
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"--captions {arguments.captions}: no COCO captions file ({error!r}): name the set's official "
                         "file") from None
    count = arguments.count or COUNT[arguments.set]
    if count > len(ids):
        raise InputError(f"--captions {arguments.captions}: {len(ids)} images with captions, {count} are needed: use "
                         f"the official file of {arguments.set}, or --count")
    if count < len(ids):
        ids = sorted(np.random.default_rng(0).choice(ids, count, replace=False).tolist())
    return [{"id": i, "file": files[i], "caption": captions[i]} for i in ids]


def _cc3m(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lines = read_text(arguments.captions, "--captions").removesuffix("\n").split("\n")
    rows = [line.split("\t") for line in lines]
    wrong = [number for number, row in enumerate(rows, 1) if len(row) != 2]
    if wrong:
        raise InputError(f"--captions {arguments.captions}: line {wrong[0]}: expected a caption, a tab and an address")
    there = {int(file.stem): file.name for file in arguments.images.glob("*.jpg") if file.stem.isdecimal()}
    chosen = [{"id": i, "file": there[i], "caption": " ".join(row[0].split())} for i, row in enumerate(rows)
              if i in there][: arguments.count]
    print(f"{len(chosen)} of {len(rows)} rows have an image", file=sys.stderr)
    if not chosen:
        raise InputError(f"--images {arguments.images}: holds no <row>.jpg, counted from 0: download the addresses "
                         f"of {arguments.captions} there")
    return chosen


def _write_pairs(arguments: argparse.Namespace, out: Path, pairs: list[dict[str, Any]]) -> None:
    from tqdm import tqdm

    from ..data.images import Unreadable, decode, square

    missing = [pair["file"] for pair in pairs if not (arguments.images / pair["file"]).is_file()]
    _refuse(missing, f"--images {arguments.images}: lacks {len(missing)} of {len(pairs)} images")
    (out / "images").mkdir()
    damaged = []
    for i, pair in enumerate(tqdm(pairs, unit="image", dynamic_ncols=True)):
        try:
            square(decode(arguments.images / pair["file"])[0], arguments.size).save(out / "images" / f"{i:06d}.png")
        except Unreadable as error:
            damaged.append(f"{pair['file']}: {error}")
    _refuse(damaged, f"--images {arguments.images}: {len(damaged)} of {len(pairs)} images cannot be read")
    (out / "prompts.txt").write_text("".join(f"{pair['caption']}\n" for pair in pairs), encoding="utf-8")
    about = {"set": arguments.set, "sampling": __doc__, "size": arguments.size,
             "resizing": "centre square, bicubic, antialiased", "captions": arguments.captions.name,
             "images": [{"id": pair["id"], "file": pair["file"]} for pair in pairs]}
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _refuse(names: list[str], problem: str) -> None:
    if names:
        shown = ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
        raise InputError(f"{problem} ({shown}): mend that folder; nothing was written")
