"""Runs mutants against the tests and sorts them: killed, survived, invalid, known to be equivalent."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .generate import Mutant, generate
from .sources import ROOT, Source
from .switches import VARIABLE, Switched
from .workspace import Workspace, errors_of, stages_for

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest depends on tomli there
    import tomli as tomllib

_EQUIVALENT = Path(__file__).with_name("equivalent.toml")
# A loop that a mutant made endless shows after this many times what the tests take with the original.
_PATIENCE = 4.0
_BASELINE_LIMIT = 600.0


class BaselineError(Exception):
    """The tests of a source fail without any mutant."""


@dataclass(frozen=True)
class Result:
    """What became of a mutant.

    Attributes:
        status: ``killed``, ``survived``, ``equivalent`` (survived, and is known to change nothing) or ``invalid``.
        by: the test that failed, or how the run ended; for survivors that are equivalent, why.
    """

    mutant: Mutant
    status: str
    seconds: float
    by: str

    def as_json(self) -> dict[str, object]:
        return {"status": self.status, "seconds": self.seconds, "by": self.by, **asdict(self.mutant)}


def mutants_of(
    source: Source, sample: int | None = None, seed: int = 0, operator: str | None = None
) -> list[Mutant]:
    """All mutants of a source (made by one operator), or a random sample of them that the seed determines."""
    mutants = generate(source.path, (ROOT / source.path).read_text())
    mutants = [m for m in mutants if operator in (None, m.operator)]
    # A larger sample contains every smaller one of the same seed.
    random.Random(f"{seed} {source.path}").shuffle(mutants)
    return sorted(mutants[:sample], key=lambda m: (m.start, m.end, m.replacement))


def equivalents() -> dict[tuple[str, str, str], str]:
    """(file, original lines, mutated lines or ``*`` for any) -> why nothing can be observed; lines may move."""
    entries = tomllib.loads(_EQUIVALENT.read_text()).get("mutant", [])
    return {(e["file"], e["original"], e["mutated"]): e["why"] for e in entries}


Progress = Callable[[Result], None]


class Campaign:
    """Runs sources one after the other, in one workspace per kit; use as a context manager."""

    def __init__(self, folder: Path | None = None) -> None:
        self._keep = folder is not None
        self._folder = folder or Path(tempfile.mkdtemp(prefix="mutants-"))
        self._workspaces: dict[str, Workspace] = {}
        self._known = equivalents()

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *error: object) -> None:
        for workspace in self._workspaces.values():
            workspace.close()
        if not self._keep:
            shutil.rmtree(self._folder, ignore_errors=True)

    def workspace(self, kit: str) -> Workspace:
        if kit not in self._workspaces:
            self._workspaces[kit] = Workspace(self._folder / kit, kit)
        return self._workspaces[kit]

    def run(self, source: Source, mutants: Sequence[Mutant]) -> Iterator[Result]:
        """Results in the order in which they come.

        Raises:
            BaselineError: the unchanged source does not pass.
        """
        workspace = self.workspace(source.kit)
        try:
            if source.path.endswith(".py"):
                yield from self._replaced(workspace, source, mutants)
            else:
                yield from self._switched(workspace, source, mutants)
        finally:
            workspace.restore(source.path)

    def _replaced(self, workspace: Workspace, source: Source, mutants: Sequence[Mutant]) -> Iterator[Result]:
        text = workspace.read(source.path)
        limits = self._baseline(workspace, source, mutants)
        for mutant in mutants:
            mutated = mutant.applied(text)
            try:
                compile(mutated, source.path, "exec")
            except SyntaxError as error:
                yield Result(mutant, "invalid", 0.0, str(error))
                continue
            workspace.write(source.path, mutated)
            yield self._tested(workspace, source, mutant, limits, {})

    def _switched(self, workspace: Workspace, source: Source, mutants: Sequence[Mutant]) -> Iterator[Result]:
        text = workspace.read(source.path)
        switched = Switched(text, mutants)
        self._build_switched(workspace, source, switched)
        limits = self._baseline(workspace, source, mutants)
        for number, mutant in enumerate(mutants):
            if number not in switched.alone:
                yield self._tested(workspace, source, mutant, limits, {VARIABLE: str(number)})
        for number in sorted(switched.alone):
            workspace.write(source.path, mutants[number].applied(text))
            messages = workspace.build(source)
            if messages is not None:
                yield Result(mutants[number], "invalid", 0.0, errors_of(messages))
            else:
                yield self._tested(workspace, source, mutants[number], limits, {})

    @staticmethod
    def _build_switched(workspace: Workspace, source: Source, switched: Switched) -> None:
        messages: str | None = ""
        for _ in range(6):
            rendered = switched.render()
            workspace.write(source.path, rendered)
            messages = workspace.build(source)
            if messages is None:
                return
            if not switched.refused(rendered, messages, Path(source.path).name):
                break
        # Something that cannot be told from the messages: every mutant is compiled by itself.
        switched.alone.update(range(len(switched.mutants)))
        workspace.restore(source.path)
        if (messages := workspace.build(source)) is not None:
            raise BaselineError(f"{source.path} does not compile:\n{errors_of(messages)}")

    @staticmethod
    def _baseline(workspace: Workspace, source: Source, mutants: Sequence[Mutant]) -> dict[object, float]:
        limits: dict[object, float] = {}
        for stages in {stages_for(source, m.operator) for m in mutants}:
            answer = workspace.test(stages, _BASELINE_LIMIT, cache=True)
            if answer["outcome"] != "passed":
                raise BaselineError(f"{source.path}: {answer}\n{answer.get('output', '')}")
            limits[stages] = 15 + _PATIENCE * answer["seconds"]
        return limits

    def _tested(
        self,
        workspace: Workspace,
        source: Source,
        mutant: Mutant,
        limits: dict[object, float],
        environment: dict[str, str],
    ) -> Result:
        stages = stages_for(source, mutant.operator)
        answer = workspace.test(stages, limits[stages], environment)
        status, by = "killed", answer["by"] if answer["outcome"] == "failed" else answer["outcome"]
        if answer["outcome"] == "misplaced":
            raise BaselineError(answer["by"])
        if answer["outcome"] == "passed":
            keys = [(mutant.path, mutant.original, mutated) for mutated in (mutant.mutated, "*")]
            why = next((self._known[key] for key in keys if key in self._known), None)
            status, by = ("survived", "") if why is None else ("equivalent", why)
        return Result(mutant, status, answer["seconds"], by)
