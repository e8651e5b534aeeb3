"""Which way of computing serves: the first, fastest first, that is proven on this machine.

A backend offers recipes and can open each. A recipe that computes in less than FP32 serves only
after it has passed the gate here, on the bundle's parity record; the verdict is remembered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..bundle import Bundle
from ..errors import BackendError, BundleError, VerificationError
from .gate import GATE_LIMITS, judge
from .record import ParityRecord, load_record
from .run import Runner, verify
from .verdicts import StoredVerdict, Subject, load_verdict, save_verdict

_LOG = logging.getLogger(__name__)

R = TypeVar("R", bound=Runner)


@dataclass(frozen=True)
class Recipe:
    """One way to compute that a backend offers.

    Attributes:
        name: such as ``"fp16"``, or ``"ENCODER+DECODER"`` where the two differ.
        encoder: what identifies its encoder. Where the feature maps of one recipe fail, no other
            recipe with the same encoder is tried.
        subject: what a verdict on it is about, or a function that finds out, for example by
            building what is to be judged; ``None`` where it needs no verdict, as in FP32.
    """

    name: str
    encoder: str
    subject: Subject | Callable[[], Subject] | None = None


def select(
    bundle: Bundle,
    recipes: Sequence[Recipe],
    open_recipe: Callable[[Recipe], R],
    *,
    say: Callable[[str], None] = _LOG.info,
    warn: Callable[[str], None] | None = None,
    on_verdict: Callable[[Recipe, StoredVerdict], None] | None = None,
) -> R:
    """Open the first recipe that is proven here, and prove it where that has not been done.

    Args:
        bundle: what the recipes run.
        recipes: fastest first.
        open_recipe: makes a recipe ready to run; what it raises sends the search to the next one.
        say: told how each recipe did.
        warn: told in its place why one does not serve, unless that was known before.
        on_verdict: told every verdict that is reached now.

    Returns:
        What ``open_recipe`` made of the recipe that serves.

    Raises:
        VerificationError: the only recipe fails the gate.
        BackendError: none can serve; the message says why for each.
        BundleError: the bundle's parity record is damaged, or the only recipe's files are.
    """
    problems: list[str] = []
    failed_encoders: set[str] = set()
    record: ParityRecord | None = None

    def pass_over(recipe: Recipe, error: Exception, *, is_known: bool = False) -> None:
        if len(recipes) == 1:
            raise error
        # As text: a kept traceback would keep what was opened alive.
        problems.append(f"not {recipe.name}: {error}")
        (say if is_known or warn is None else warn)(problems[-1])

    for recipe in recipes:
        if recipe.encoder in failed_encoders:
            continue
        opened: R | None = None
        try:
            subject = recipe.subject() if callable(recipe.subject) else recipe.subject
        except BackendError as error:
            pass_over(recipe, error)
            continue
        stored = None if subject is None else load_verdict(bundle, subject)
        if stored is None and subject is not None and record is None:
            record = load_record(bundle)
            # A warning, because a service that starts would seem to hang.
            _LOG.warning(
                "%s is compared with the parity record, once on this machine; at full size that "
                "takes a minute or two",
                subject.backend,
            )
        try:
            if stored is None or stored.passed:
                opened = open_recipe(recipe)
            if stored is None and opened is not None and subject is not None:
                say(f"comparing {recipe.name} with the parity record")
                stored = _prove(opened, bundle, record)
                save_verdict(bundle, subject, stored)
                if on_verdict is not None:
                    on_verdict(recipe, stored)
            if stored is not None and not stored.passed:
                if stored.encoder_failed:
                    failed_encoders.add(recipe.encoder)
                raise VerificationError(
                    f"{recipe.name} fails the gate on this machine: {stored.explanation}"
                )
        except (BackendError, BundleError, VerificationError) as error:
            is_known = opened is None and isinstance(error, VerificationError)
            pass_over(recipe, error, is_known=is_known)
        else:
            assert opened is not None
            say("; ".join([f"computing in {recipe.name}", *problems]))
            return opened
    raise BackendError("; ".join(problems) or "there is nothing to choose from")


def _prove(runner: Runner, bundle: Bundle, record: ParityRecord | None) -> StoredVerdict:
    assert record is not None
    return StoredVerdict.of(judge(verify(runner, bundle.manifest, record, GATE_LIMITS)))
