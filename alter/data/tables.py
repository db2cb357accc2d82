"""Hugging Face data sets: tables with a column of images, opened whole or streamed a row group at a time."""

import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.config import DataConfig
from ..common.errors import InputError
from .base import Framing, SourceDefaults, draw_caption, list_files, read_captions, read_label, visible
from .images import Unreadable
from .shards import Shards, left_out


class Rows(SourceDefaults):
    """A table of which each row is a sample. Its condition is `data.caption_column`, or the classes in
    `data.label_column` where there are no captions, or where both are there and "class" is wanted.

    Args:
        features: the table's columns, as `datasets` describes them.
        wanted: as for `open_source`.

    Raises:
        InputError: if a column is missing, or holds something else.
    """

    def __init__(self, config: DataConfig, seed: int, features: Any, wanted: str | None) -> None:
        self.path, self.image_column = str(config.path), config.image_column
        self.seed, self.framing = seed, Framing(config, seed)
        columns = ", ".join(features)
        if self.image_column not in features:
            raise InputError(f"data.image_column={self.image_column!r}: no such column: choose one of {columns}")
        captions, labels = config.caption_column, config.label_column
        captioned, labelled = _is_text(features.get(captions)), _is_integer(features.get(labels))
        if not labelled and labels != DataConfig.label_column and wanted != "text":
            raise InputError(f"data.label_column={labels!r}: {_holds(labels, features, 'whole numbers')}: choose one "
                             f"of {columns}")
        if not captioned and (not labelled or wanted == "text"):
            raise InputError(f"data.caption_column={captions!r}: {_holds(captions, features, 'text')}: choose one of "
                             f"{columns}; for classes set data.label_column")
        by_class = labelled and (wanted == "class" or not captioned)
        self.condition = labels if by_class else captions
        if by_class:
            self.num_classes = getattr(features[labels], "num_classes", None)
            self.classes = {name: i for i, name in enumerate(getattr(features[labels], "names", None) or ())}

    def row(self, index: int) -> dict[str, Any]:
        """The row's columns.

        Raises:
            Unreadable: if it cannot be read.
        """
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        row = self.row(key[1])
        value = row[self.condition]
        condition: dict[str, Any]
        if self.num_classes == 0:
            captions = read_captions(value, f"column {self.condition!r}")
            condition = {"captions": captions[draw_caption(len(captions), self.seed, *key)]}
        else:
            condition = {"labels": read_label(value, f"column {self.condition!r}")}
        return {**self.framing(self._content(row[self.image_column]), *key), **condition}

    def captions(self, index: int) -> list[str]:
        return read_captions(self.row(index)[self.condition], f"column {self.condition!r}")

    def _content(self, image: Any) -> Path | bytes:
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            return Path(self.path) / image
        if isinstance(image, bytes):
            return image
        raise Unreadable(f"column {self.image_column!r}: no image")

    def describe(self, index: int) -> str:
        return f"{self.path} row {index}"


class OpenedTable(Rows):
    """A data set that `datasets` wrote with save_to_disk, or a folder with parquet or arrow files anywhere below.

    Parquet is unpacked once into the cache of `datasets` ($HF_DATASETS_CACHE). Nothing is downloaded, and no code in
    the folder runs.
    """

    def __init__(self, config: DataConfig, seed: int, wanted: str | None = None) -> None:
        from datasets import Image

        rows = _open_rows(Path(str(config.path)), config.split)
        super().__init__(config, seed, rows.features, wanted)
        try:
            self.rows = (rows.with_format(None).select_columns([self.image_column, self.condition])
                         .cast_column(self.image_column, Image(decode=False)))
        except (TypeError, ValueError, NotImplementedError):
            raise _no_images(self.image_column, rows.features) from None
        if self.num_classes is None:
            self.num_classes = 1 + max((label for label in rows.unique(self.condition) if label is not None), default=0)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        try:
            return self.rows[index]
        except (OSError, ValueError) as error:
            raise Unreadable(f"row cannot be read ({error})") from None


class StreamedTable(Rows):
    """Parquet files below a folder or an address such as hf://datasets/OWNER/NAME, read a row group at a time.

    Nothing is unpacked or kept on disk. A file that is damaged, or whose number is missing between its neighbours',
    counts as many unreadable rows as the median of the others.
    """

    def __init__(self, config: DataConfig, seed: int, wanted: str | None = None) -> None:
        import fsspec
        from datasets import Features

        address = str(config.path)
        try:
            self.system, root = fsspec.core.url_to_fs(address)
            found = [name[len(root):].lstrip("/") for name in self.system.find(root)]
        except Exception as error:  # of fsspec's and the network's many kinds
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"data.path={address!r}: cannot be listed ({reason})") from None
        self.root = root.rstrip("/")
        names = _choose_tables(sorted(visible(found, {".parquet"})), address, config.split)
        files = sorted({*names, *left_out(names)})
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(self._footer, files))
        readable = [footer for footer in footers if not isinstance(footer, str)]
        if not readable:
            raise InputError(f"data.path={address!r}: none of its {len(names)} parquet files can be read "
                             f"({footers[0]})")
        features = Features.from_arrow_schema(readable[0][1])
        super().__init__(config, seed, features, wanted)
        if not _holds_images(features[self.image_column]):
            raise _no_images(self.image_column, features)
        usual = round(statistics.median(sum(counts) for counts, _ in readable))
        self.groups: list[tuple[str, int]] = []
        lengths: list[int | None] = []
        for name, footer in zip(files, footers, strict=True):
            counts = [usual] if isinstance(footer, str) else footer[0]
            self.groups += [(name, group) for group in range(len(counts))]
            lengths += counts
        self.stored = Shards(lengths, self._read, most=config.shuffle_shards)
        self.shards = self.stored.lengths

    def __len__(self) -> int:
        return self.stored.ends[-1]

    def row(self, index: int) -> dict[str, Any]:
        shard, position = self.stored.locate(index)
        return self.stored[shard].slice(position, 1).to_pylist()[0]

    def describe(self, index: int) -> str:
        shard, position = self.stored.locate(index)
        name, group = self.groups[shard]
        return f"{self.root}/{name} row group {group} row {position}"

    def _open(self, name: str) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.system.open(f"{self.root}/{name}"))

    def _footer(self, name: str) -> tuple[list[int], Any] | str:
        """The rows of each row group and the schema of a file, or why there are none."""
        try:
            with self._open(name) as file:
                return [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], file.schema_arrow
        except Exception as error:  # of pyarrow's, fsspec's and the network's many kinds
            return " ".join(str(error).split())[:200]

    def _read(self, shard: int) -> Any:
        """The row group's table."""
        name, group = self.groups[shard]
        wanted = [self.image_column, self.condition]
        try:
            with self._open(name) as file:
                table = file.read_row_group(group, columns=wanted)
        except Exception as error:
            raise Unreadable(f"row group cannot be read ({' '.join(str(error).split())[:200]})") from None
        if set(table.column_names) != set(wanted):
            raise Unreadable(f"columns {', '.join(wanted)}: the file lacks one of them")
        return table


def _open_rows(folder: Path, part: str | None) -> Any:
    """The `datasets.Dataset` in a folder, all of it or one part."""
    from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            found = load_from_disk(str(folder))
            if not isinstance(found, DatasetDict):
                return found
            if part is not None and part not in found:
                raise InputError(f"data.split={part!r}: the data set in {folder} has {', '.join(found)}: choose one")
            return concatenate_datasets(list(found.values())) if part is None else found[part]
        names = _choose_tables(visible(list_files(folder), {".parquet", ".arrow"}), str(folder), part)
        missing = left_out(names)
        if missing:
            raise InputError(f"data.path={str(folder)!r}: {missing[0]} is missing: fetch it, or set data.stream=true "
                             "to go on without it")
        files = [str(folder / name) for name in names]
        if names[0].endswith(".parquet"):
            return Dataset.from_parquet(files)
        return concatenate_datasets([Dataset.from_file(file) for file in files])
    except InputError:
        raise
    except Exception as error:  # of pyarrow's, of datasets' and the system's many kinds
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"data.path={str(folder)!r}: cannot be read as a data set ({reason}): "
                         "write it again") from None


def _choose_tables(names: list[str], place: str, part: str | None) -> list[str]:
    """Table files whose names begin with the part's, or else in folders of its name; all files for None."""
    if not names:
        raise InputError(f"data.path={place!r}: no .parquet or .arrow files, and not written by save_to_disk")
    if part is not None:
        chosen = ([name for name in names if PurePosixPath(name).name.startswith(part)]
                  or [name for name in names if part in name.split("/")[:-1]])
        if not chosen:
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise InputError(f"data.split={part!r}: no file's name starts with it: {place} has {some}; "
                             "choose another, or null for all files")
        names = chosen
    if len({PurePosixPath(name).suffix for name in names}) > 1:
        raise InputError(f"data.path={place!r}: both .parquet and .arrow files: keep one kind")
    return names


def _no_images(column: str, features: Any) -> InputError:
    return InputError(f"data.image_column={column!r}: holds no images but {features[column]}: choose one of "
                      f"{', '.join(features)}")


def _holds_images(feature: Any) -> bool:
    from datasets import Image, Value

    return (isinstance(feature, Image) or isinstance(feature, Value) and "binary" in feature.dtype
            or isinstance(feature, dict) and "bytes" in feature)


def _is_text(feature: Any) -> bool:
    """Whether it is a column of captions, or of lists of them."""
    from datasets import Value

    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return isinstance(inner, Value) and "string" in inner.dtype


def _holds(column: str, features: Any, wanted: str) -> str:
    if column not in features:
        return "no such column"
    return f"holds no {wanted} but {getattr(features[column], 'dtype', type(features[column]).__name__)}"


def _is_integer(feature: Any) -> bool:
    from datasets import ClassLabel, Value

    return isinstance(feature, ClassLabel) or isinstance(feature, Value) and "int" in feature.dtype
