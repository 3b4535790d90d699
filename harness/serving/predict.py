"""Classify photographs with a study's saved model: the likeliest classes and their probabilities."""

from __future__ import annotations

import codecs
import csv
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from harness.base.errors import InputError, shown
from harness.base.files import replacing
from harness.config.find import Found
from harness.data.cache import WORKERS
from harness.data.decoding import SUFFIXES, check_proportions, flat_rgb, open_image
from harness.data.layout import made_by_system
from harness.serving.model import SavedModel, load_saved, preprocess
from harness.store.opening import located, read_store, url_of
from harness.training.loop import outputs_of
from harness.training.runtime import find_device
from harness.training.step import Runtime, is_out_of_memory

BATCH = 32  # photographs per batch; the next ones are decoded meanwhile
TOP = 5
STDOUT = Path("-")  # write the table to stdout


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A class and its probability, 0 to 1."""

    name: str
    probability: float


Answer = list[Guess] | InputError  # the likeliest class first; or why the file was skipped


class Predictor:
    """A saved model on one device, in fp32 whatever the study's precision.

    A study in fp32 gives the same probabilities up to rounding (1e-4); one in bf16 differs in the third digit.
    """

    def __init__(self, saved: SavedModel, device: torch.device) -> None:
        self.saved = saved
        self._runtime = Runtime(
            device=device, bf16=False, channels_last=False, deterministic=saved.config.runtime.deterministic
        )
        self._model = self._runtime.place(saved.model)

    def photograph(self, given: Path | Image) -> Tensor:
        """Return an image (file) of any size, mode and orientation as model input, float32 [3, S, S].

        Raises InputError naming the file if it is not an image, damaged, or too large or too narrow to decode safely.
        """
        image = open_image(given) if isinstance(given, Path) else flat_rgb(given)
        name = given if isinstance(given, Path) else Path("the image")
        check_proportions(name, *image.size, self.saved.image_size)
        return preprocess([image], self.saved.config)[0]

    def guesses(self, images: Tensor, count: int) -> list[list[Guess]]:
        """Return the `count` likeliest classes of each image [B, 3, S, S], likeliest first, the earlier of equals.

        The images are from `photograph`. Raises InputError if the device has no room for one.
        """
        device = self._runtime.device

        def parts(size: int) -> Iterator[Tensor]:
            return (part.to(device) for part in images.split(size))

        try:
            logits = outputs_of(self._model, parts, self._runtime)
        except MemoryError as error:
            raise InputError("The device has no room for one image; free its memory, or give --device cpu.") from error
        values, labels = torch.softmax(logits, dim=1).cpu().sort(dim=1, descending=True, stable=True)
        return [
            [Guess(name=self.saved.classes[label], probability=value) for value, label in zip(*each, strict=True)]
            for each in zip(values[:, :count].tolist(), labels[:, :count].tolist(), strict=True)
        ]

    def answers(self, files: Sequence[Path], count: int) -> Iterator[tuple[Path, Answer]]:
        """Yield the guesses for every file, in order; a batch is decoded while the model runs the previous one."""
        with ThreadPoolExecutor(WORKERS) as pool:
            decoding = pool.map(self._decoded, files[:BATCH])
            for start in range(0, len(files), BATCH):
                decoded = list(decoding)
                decoding = pool.map(self._decoded, files[start + BATCH : start + 2 * BATCH])
                images = [each for each in decoded if isinstance(each, Tensor)]
                guesses = iter(self.guesses(torch.stack(images), count) if images else [])
                for file, each in zip(files[start : start + BATCH], decoded, strict=True):
                    yield file, next(guesses) if isinstance(each, Tensor) else each

    def _decoded(self, path: Path) -> Tensor | InputError:
        try:
            return self.photograph(path)
        except InputError as error:
            return error


def load_predictor(found: Found, storage: str | None, device: str, data_root: str | None = None) -> Predictor:
    """Load a study's saved model on a device. Raises InputError if there is no such study, model or device."""
    where = find_device(device)
    with read_store(found.study.name, url_of(found, storage)) as store:
        study = located(found, store, data_root)
        saved = load_saved(study, store, found.beside(store.url, ".model"))
    try:
        return Predictor(saved, where)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"--device {device}: it has no room for the model; give --device cpu.") from error


def top(count: int | None, classes: int) -> int:
    """Return the number of classes to show. Raises InputError if the model knows fewer."""
    if count is not None and count > classes:
        raise InputError(f"--top {count}: the model knows {classes} classes; give at most {classes}.")
    return min(TOP, classes) if count is None else count


def find_images(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the given files and, in order, all files below the given folders with an image suffix.

    Also return the other files there; hidden and system files are ignored. Raises InputError if a path does not exist
    or no image is found, and OSError if a folder cannot be read.
    """
    found: list[Path] = []
    left_out: list[Path] = []
    for path in paths:
        if path.is_dir():
            for file in _in_folder(path):
                # A pipe would block; reading reports a broken link.
                image = file.suffix.lower() in SUFFIXES and (file.is_file() or file.is_symlink())
                (found if image else left_out).append(file)
        elif path.exists():
            found.append(path)
        else:
            raise InputError(f"There is no file or folder {path}; give photographs, or folders of photographs.")
    if not found:
        folders = ", ".join(map(str, paths))
        raise InputError(f"{folders} holds no images ({' '.join(sorted(SUFFIXES))}); give photographs or a folder.")
    return found, left_out


def _in_folder(folder: Path) -> Iterator[Path]:
    seen = set[str]()  # a link may lead back
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not made_by_system(name))
        yield from (Path(place, name) for name in sorted(files) if not made_by_system(name))


def _refuse(error: OSError) -> NoReturn:
    raise error  # os.walk would silently skip the folder


def predict(
    predictor: Predictor, files: Sequence[Path], count: int, table: Path | None, left_out: Sequence[Path] = ()
) -> bool:
    """Print the guesses for every file, or write them to `table` as CSV: file, rank, class, probability.

    The table's name is printed, unless it is STDOUT. Returns whether every file has its guesses; unreadable files, and
    those `left_out` by their names, are listed on stderr. Raises Halt if the table cannot be written.
    """
    # Answers in a terminal show the progress themselves, and a bar would interrupt them.
    quiet = not sys.stderr.isatty() or (table in (None, STDOUT) and sys.stdout.isatty())
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, markup=False)
    bar = Progress(*columns, console=console, disable=quiet, transient=True, redirect_stdout=False)
    damaged = 0

    def readable() -> Iterator[tuple[Path, list[Guess]]]:
        nonlocal damaged
        for file, answer in bar.track(predictor.answers(files, count), total=len(files)):
            if isinstance(answer, InputError):
                damaged += 1
                console.out(f"{shown(str(answer))} Skipping it.", highlight=False)
            else:
                yield file, answer

    with bar:
        if table is None:
            _print(readable())
        elif table == STDOUT:
            _write(readable(), sys.stdout.buffer)
        else:
            with replacing(table) as file:
                _write(readable(), file)
            print(shown(str(table)))
    if damaged:
        console.out(f"{damaged} of {len(files)} files could not be read.", highlight=False)
    for other in left_out:
        why = "not a regular file" if other.suffix.lower() in SUFFIXES else "not an image by its name"
        console.out(f"{shown(str(other))} is {why}. Skipping it.", highlight=False)
    if left_out:
        console.out(f"Skipped: {len(left_out)} of {len(files) + len(left_out)} files.", highlight=False)
    return not damaged and not left_out


def _print(answers: Iterable[tuple[Path, list[Guess]]]) -> None:
    for number, (file, guesses) in enumerate(answers):
        print(("\n" if number else "") + shown(str(file)))
        for guess in guesses:
            print(f"  {guess.probability * 100:6.2f} %  {guess.name}", flush=True)


def _write(answers: Iterable[tuple[Path, list[Guess]]], file: BinaryIO) -> None:
    writer = csv.writer(codecs.getwriter("utf-8")(file, "surrogateescape"))
    writer.writerow(["file", "rank", "class", "probability"])
    for path, guesses in answers:
        writer.writerows([path, rank, guess.name, f"{guess.probability:.6g}"] for rank, guess in enumerate(guesses, 1))
