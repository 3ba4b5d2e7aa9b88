"""The method without this package, as its users would otherwise have it; everything is compared with this.

Two manners of the same method, written from docs/method.md alone and checked against the reference vectors of the
authors' release (python_tests/test_baselines.py):

- ``eager``: as a competent researcher writes it in PyTorch.
- ``release_manner``: in the manner of research releases, with one call for each bone, clip and pair.

Each is a module of functions with the same names and arguments; ``trainers`` puts the whole method together from
either. Nothing here calls a compiled operation of ikem_fast. Of the package they take skeleton layouts, constants,
quirks and the plain-PyTorch encoder.
"""
