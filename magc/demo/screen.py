"""What the demo shows while it works: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Screen:
    """Output for people.

    Args:
        console: where to; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console(highlight=False) if console is None else console

    def title(self, text: str) -> None:
        """A heading."""
        self._console.print(f"\n[bold]{text}[/bold]")

    def line(self, text: str) -> None:
        """A line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column is text and whose others are numbers."""
        table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    @contextmanager
    def working(self, what: str) -> Generator[Callable[[str], None]]:
        """While something of unknown length runs; yields what to tell news to."""
        if not self._console.is_terminal:
            self._console.print(f"{what} ...", markup=False)
            yield lambda news: self._console.print(f"  {news}", markup=False)
            return
        with self._console.status(f"{what} ...") as status:
            yield lambda news: status.update(f"{what}: {news} ...")

    @contextmanager
    def steps(self, what: str, total: int, *, lines: int = 9) -> Generator[Callable[[int, str], None]]:
        """While ``total`` steps run; yields what to tell how many more were done, and news.

        Where there is no terminal, about ``lines`` lines stand for the bar.
        """
        if not self._console.is_terminal:
            yield _Lines(self._console, what, total, lines).advance
            return
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=self._console,
        )
        with progress:
            task = progress.add_task(what, total=total, news="")
            yield lambda count, news: progress.update(task, advance=count, news=news)


class _Lines:
    """Progress as a few lines."""

    def __init__(self, console: Console, what: str, total: int, lines: int) -> None:
        self._console, self._what, self._total, self._lines = console, what, total, lines
        self._done = 0
        self._shown = 0

    def advance(self, count: int, news: str) -> None:
        self._done += count
        part = self._done * self._lines // self._total
        if part > self._shown:
            self._shown = part
            self._console.print(f"{self._what} {self._done}/{self._total}  {news}", markup=False)
