"""What the runner needs to know of a family of cases: the LSTM's and the GAN blocks'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import cases, gan_cases, gan_providers, model_measured, providers, summary, workloads
from benchmarks.parity import Results, Verdict, check, largest_error

#: Results of one step of a provider on a problem.
Evaluate = Callable[[Any, Any], Results]


@dataclass(frozen=True)
class Suite:
    """A family of cases with its modes, providers and promises.

    Attributes:
        name: what ``--suite`` takes.
        cases, modes, providers: the registries.
        make_problem: draws a case's values: ``(case, *, dtype, device, seed)``.
        real: a case with its users' sizes on a device, where those for a CPU are smaller.
        longest_sum: terms in a case's longest chain of sums.
        sizes: what of a case goes into its rows.
        verdict: judges a provider: ``(evaluate, provider, problem, results, reference, stock results, dtype)``.
        classes, bars: what is summed up and promised, on a CPU.
        gpu_bars: what is promised on a GPU.
        moved: bytes that a case moves by the performance model, or None: ``(case, mode, bytes of an element, clusters)``.
    """

    name: str
    cases: tuple[Any, ...]
    modes: tuple[str, ...]
    providers: tuple[Any, ...]
    make_problem: Callable[..., Any]
    real: Callable[[Any, str], Any]
    longest_sum: Callable[[Any], int]
    sizes: Callable[[Any], dict[str, Any]]
    verdict: Callable[[Evaluate, Any, Any, Results, Results, Results | None, torch.dtype], Verdict]
    classes: dict[str, summary.Predicate]
    bars: tuple[summary.Bar, ...]
    gpu_bars: tuple[summary.Bar, ...] = ()
    moved: Callable[[Any, str, int, bool], float | None] = lambda *call: None


def _judge_layer(
    evaluate: Evaluate,
    provider: Any,
    problem: Any,
    results: Results,
    reference: Results,
    stock: Results | None,
    dtype: torch.dtype,
) -> Verdict:
    del evaluate, provider
    return check(results, reference, stock, dtype=dtype, terms=cases.longest_sum(problem.case))


def _judge_blocks(
    evaluate: Evaluate,
    provider: Any,
    problem: Any,
    results: Results,
    reference: Results,
    stock: Results | None,
    dtype: torch.dtype,
) -> Verdict:
    """Outputs in the measured dtype; everything, gradients of both orders included, in float64.

    The gradient of a kinked activation is discontinuous: where rounding moves a value across the kink it is another one,
    in stock as in ours, but not at the same elements. No bound in a short dtype could tell that from an error.
    """
    terms = problem.case.longest_sum
    # PyTorch rounds differently in its two layouts; its error is the larger one.
    other = gan_providers.BlockProvider("stock", channels_last=True)
    layouts = [] if stock is None else [stock, evaluate(other, problem)]
    stock = max(layouts, key=lambda r: largest_error(r["y"], reference["y"]), default=None)
    verdicts = [
        check(
            {"y": results["y"]},
            {"y": reference["y"]},
            None if stock is None else {"y": stock["y"]},
            dtype=dtype,
            terms=terms,
        )
    ]
    exact = evaluate(provider, problem.to(torch.float64))
    verdicts.append(check(exact, reference, None, dtype=torch.float64, terms=terms))
    return max(verdicts, key=lambda v: v.ratio)


LSTM = Suite(
    name="lstm",
    cases=cases.CASES,
    modes=cases.MODES,
    providers=providers.PROVIDERS,
    make_problem=workloads.make_problem,
    real=lambda case, device: case,
    longest_sum=cases.longest_sum,
    sizes=cases.sizes,
    verdict=_judge_layer,
    classes=summary.CLASSES,
    bars=summary.BARS,
)
GAN = Suite(
    name="gan",
    cases=gan_cases.CASES,
    modes=gan_cases.MODES,
    providers=gan_providers.PROVIDERS,
    make_problem=gan_providers.make_problem,
    real=gan_cases.real,
    longest_sum=lambda case: case.longest_sum,
    sizes=gan_cases.GanCase.sizes,
    verdict=_judge_blocks,
    classes=summary.GAN_CLASSES,
    bars=summary.GAN_BARS,
    gpu_bars=summary.GPU_BARS,
    moved=model_measured.moved,
)
SUITES = (LSTM, GAN)


def suite_of(case: str) -> Suite:
    """The suite that has a case of this name."""
    return next(suite for suite in SUITES if any(c.name == case for c in suite.cases))
