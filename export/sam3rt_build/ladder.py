"""The search for the fastest pair of recipes that passes the gate.

Encoder and decoder have a ladder each. A pair is judged together, as it will serve: features that
fail send the encoder one rung down, masks or scores that fail send the decoder down. Where no
decoder is good enough, the features were, by a hair, not either: then the encoder goes down and
the decoder starts again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sam3rt.accuracy.gate import Verdict

from .errors import BuildError
from .recipes import Recipe
from .typed_graph import Role


@dataclass(frozen=True)
class Trial:
    """How one pair did.

    Attributes:
        failed: what has to go one rung down; ``None`` where the pair may serve.
        reason: in words.
    """

    failed: Role | None
    reason: str


# Builds an (encoder recipe, decoder recipe) pair and runs the gate on it.
Try = Callable[[Recipe, Recipe], Trial]
Say = Callable[[str], None]


def trial_of(verdict: Verdict) -> Trial:
    """What a verdict on a pair means for the ladder."""
    if verdict.passed:
        return Trial(None, "passes the gate")
    features = not verdict.measurements or any(
        m.output.startswith("features") for m in verdict.failures
    )
    return Trial("encoder" if features else "decoder", f"refused: {verdict.explain()}")


def climb_down(recipes: Sequence[Recipe], attempt: Try, say: Say) -> tuple[Recipe, Recipe]:
    """Try pairs, fastest first, until one passes.

    Args:
        recipes: the rungs, fastest first.
        attempt: builds and judges a pair.
        say: told how each pair did.

    Returns:
        The recipes of the encoder and of the decoder that passed.

    Raises:
        BuildError: none passes; the message says how each failed.
    """
    history = []
    encoder = decoder = 0
    while encoder < len(recipes):
        trial = attempt(recipes[encoder], recipes[decoder])
        line = f"encoder {recipes[encoder].name}, decoder {recipes[decoder].name}: {trial.reason}"
        say(line)
        if trial.failed is None:
            return recipes[encoder], recipes[decoder]
        history.append(line)
        if trial.failed == "encoder":
            encoder += 1
        elif decoder + 1 < len(recipes):
            decoder += 1
        else:
            encoder, decoder = encoder + 1, 0
    tried = "\n".join(f"  {line}" for line in history)
    raise BuildError(f"no precision passes the gate on this machine:\n{tried}")
