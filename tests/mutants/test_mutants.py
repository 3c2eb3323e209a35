"""The generator of mutants, and samples of the mutants themselves: every one is noticed by some test, or explained."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .campaign import Campaign, equivalents, mutants_of
from .generate import generate
from .sources import ROOT, SOURCES, Source
from .switches import Switched

SEED, SAMPLE = 0, 12
BARRIERS = ["mbarrier_wait", "if ", "copy_bulk_wait<0>", "cluster_sync"]


@pytest.fixture(scope="session")
def campaign() -> Iterator[Campaign]:
    """One for all sources: what is compiled for one file serves the next."""
    with Campaign() as shared:
        yield shared


def mutated(path: str, text: str) -> set[tuple[str, str]]:
    return {(m.operator, m.mutated) for m in generate(path, text)}


def test_python_mutants() -> None:
    text = "def run(a, n):\n    if a < 1:\n        log(a)\n    return tl.where(a, a + n * 2.0, 0.0)\n"
    got = mutated("x.py", text)
    assert got >= {
        ("comparison", "if a <= 1:"),
        ("comparison", "if a >= 1:"),
        ("constant", "if a < 0:"),
        ("mask", "if False:"),
        ("store", "pass"),
        ("sign", "return tl.where(a, a - n * 2.0, 0.0)"),
        ("term", "return tl.where(a, a, 0.0)"),
        ("term", "return tl.where(a, n * 2.0, 0.0)"),
        ("term", "return tl.where(a, a + n, 0.0)"),
        ("constant", "return tl.where(a, a + n * 2.0, 1.0)"),
        ("mask", "return (a + n * 2.0)"),
    }
    assert not any("def" in line for _, line in got)
    for mutant in generate("x.py", text):
        ast.parse(mutant.applied(text))


def test_cpp_mutants() -> None:
    text = """
#if A < B
template <class T> void f(V* x, int n) {  // a + b
  const V di = x[0] * s.i + ext.i;
  for (int k = 0; k < n; ++k) store(x + k, di - 1);
  if (projected) sweep.wait();
  y = n ? a : b;
}
"""
    got = mutated("x.h", text)
    assert got >= {
        ("gate", "const V di = x[0] * s.f + ext.i;"),
        ("term", "const V di = ext.i;"),
        ("term", "const V di = x[0] * s.i;"),
        ("sign", "const V di = x[0] * s.i - ext.i;"),
        ("constant", "const V di = x[1] * s.i + ext.i;"),
        ("comparison", "for (int k = 0; k <= n; ++k) store(x + k, di - 1);"),
        ("store", "for (int k = 0; k < n; ++k) ;"),
        ("gate", "for (int k = 0; k < n; ++k) store(x + k, df - 1);"),
        ("barrier", "if (projected) ;"),
        ("mask", "if (false) sweep.wait();"),
        ("mask", "y = true ? a : b;"),
    }
    assert not any("#" in line or "template" in line for _, line in got)


def test_mutants_of_barriers_and_buffers() -> None:
    text = """
void f(uint64_t* ready) {
  float sums[kTiles][2];
  mbarrier_wait(&ready[step % 2], step / 2 % 2);
  if (first) mbarrier_arrive_expect(&ready[0], bytes);
  for (int n = 0; n < kParts; ++n) total += shared.part[1][n];
  copy_bulk_wait<0>();
  store_async(to, x, ready);
  cluster_sync();
}
"""
    got = mutated("x.cuh", text)
    assert got >= {
        ("barrier", ";"),
        ("parity", "mbarrier_wait(&ready[(step + 1) % 2], step / 2 % 2);"),
        ("parity", "mbarrier_wait(&ready[step % 2], (step / 2 + 1) % 2);"),
        ("slot", "mbarrier_wait(&ready[0], step / 2 % 2);"),
        ("barrier", "if (first) ;"),
        ("slot", "for (int n = 0; n < kParts; ++n) total += shared.part[1][0];"),
    }
    kinds = Counter(operator for operator, _ in got)
    assert (kinds["slot"], kinds["parity"]) == (2, 2), "sizes of arrays are left alone"
    removed = [m for m in generate("x.cuh", text) if m.operator == "barrier"]
    assert [m.original.split("(")[0] for m in removed] == BARRIERS


def test_switches_contain_every_mutant_and_the_original() -> None:
    text = "void f() {\n  const V a = b + c * s.i;\n  for (; k < n; ++k) store(p + k, a);\n}\n"
    mutants = generate("x.h", text)
    rendered = Switched(text, mutants).render()
    for number in range(len(mutants)):
        assert f"FB_MUTANT({number})" in rendered
    assert "FB_MUTANT(0) ? (c * s.i) :" in rendered
    refused = Switched(text, mutants)
    line = next(n for n, text in enumerate(refused.render().splitlines(), 1) if "FB_MUTANT(0) ?" in text)
    assert refused.refused(refused.render(), f"a/x.h:{line}:3: error: no", "x.h") == {0}
    assert "FB_MUTANT(0)" not in refused.render()


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.path)
def test_every_source_has_mutants(source: Source) -> None:
    mutants = mutants_of(source)
    text = (ROOT / source.path).read_text()
    assert all(m.applied(text) != text for m in mutants)
    assert len({m.applied(text) for m in mutants}) == len(mutants) > 0
    assert mutants_of(source, 3, seed=1) == mutants_of(source, 3, seed=1)
    if source.path.startswith("csrc"):
        assert len(Switched(text, mutants).alone) < len(mutants) / 10, "most mutants are compiled together"


def test_explanations_are_about_mutants_that_exist() -> None:
    mutants = [m for source in SOURCES for m in mutants_of(source)]
    existing = {(m.path, m.original, mutated) for m in mutants for mutated in (m.mutated, "*")}
    assert not equivalents().keys() - existing
    assert all(len(why) > 20 for why in equivalents().values())


def test_a_planted_mutant_is_killed_and_removed(tmp_path: Path) -> None:
    stages = (("tests/ops/test_lstm_gates.py", "-k", "values and reference and float64"),)
    source = Source("python/fuseblock/reference/lstm_gates.py", "python", stages)
    wanted = "delta = torch.cat([di * i * (1 + i),"
    [planted] = [m for m in mutants_of(source) if m.mutated.startswith(wanted)]
    with Campaign(tmp_path) as alone:
        [result] = alone.run(source, [planted])
        assert (result.status, result.by[:6]) == ("killed", "FAILED")
        assert alone.workspace("python").read(source.path) == (ROOT / source.path).read_text()
    assert wanted not in (ROOT / source.path).read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.path)
def test_no_mutant_survives(campaign: Campaign, source: Source) -> None:
    """A sample of the mutants of a file, a known seed: ``python -m tests.mutants`` runs all of them."""
    results = list(campaign.run(source, mutants_of(source, SAMPLE, SEED)))
    survivors = [r.mutant for r in results if r.status == "survived"]
    assert not survivors, "\n".join(f"{m.name}\n  - {m.original}\n  + {m.mutated}" for m in survivors)
    assert any(r.status == "killed" for r in results)
