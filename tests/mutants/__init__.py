"""Mutation testing: small mechanical changes to kernels and equations, each of which some test must notice.

``tokens`` and ``generate`` make the mutants of a file, ``sources`` says which files have mutants and which tests must kill
them, ``workspace`` applies them to a private copy of the project, ``campaign`` runs the tests and records who survived.
Survivors are holes in the tests, or change nothing that can be observed; the latter are explained in ``equivalent.toml``.

    python -m tests.mutants --list
    python -m tests.mutants --source 'csrc/math/*' --sample 50 --seed 1
"""
